"""Typed configuration: one file per section; YAML plus dotted overrides in, one immutable `Config` out."""

from megatron_fapo.config.root import Config

__all__ = ["Config"]
