"""Checkpoint formats: what a method's files look like, as pure functions on dicts; and files that are containers."""

from qhub.formats.container import Container, Packed
from qhub.formats.spec import Entry, Format, Fusion

__all__ = ["Container", "Entry", "Format", "Fusion", "Packed"]
