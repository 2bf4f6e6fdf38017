"""FAPO against the baseline where a program knows every wrong step: `fapo bench windtunnel`.

In: the tiny models of examples/models and problems of the testbed. Out: one run directory for each arm and seed, and
over them summary.json and report.html. Every change to the algorithm is flown here first.

    arms.py      what is compared: names and overrides (pure)
    readings.py  samples of a run -> what the oracle says of them, step by step (pure)
    summary.py   readings of all runs -> numbers with intervals, and whether the claims hold (pure)
    report.py    the same as tables and figures
    command.py   data, models and runs: several at a time, each resumable
"""
