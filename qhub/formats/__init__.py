"""Checkpoint formats: the interface a method implements, and the safetensors container that all share."""

from qhub.formats.spec import Entry, Format

__all__ = ["Entry", "Format"]
