"""Strings that stand for layouts: the signature of a compiled operator takes strings, not dataclasses."""

from __future__ import annotations

import hashlib

from qhub.layouts.base import Layout

__all__ = ["layout_key", "layout_of"]

_layouts: dict[str, tuple[Layout, tuple[str, ...]]] = {}
_keys: dict[Layout, str] = {}


def layout_key(layout: Layout) -> str:
    """Return a string that stands for ``layout``; equal in every process for equal layouts."""
    key = _keys.get(layout)
    if key is None:
        key = f"{layout.kind}-{hashlib.sha256(repr(layout).encode()).hexdigest()[:16]}"
        _keys[layout] = key
        _layouts[key] = (layout, tuple(layout.part_specs()))
    return key


def layout_of(key: str) -> tuple[Layout, tuple[str, ...]]:
    """Return the layout that ``key`` stands for in this process, and the names of its parts in order."""
    return _layouts[key]
