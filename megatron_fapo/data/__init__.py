"""Prompts and their datasets, the resumable cursor, and the procedural testbed with its oracle."""
