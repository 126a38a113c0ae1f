"""A short canonical string for what a layout is besides its size: the key under which measurements are kept.

``affine bits=4 grid=block(1,128) zero_point=8.0``: the kind, then every field that differs from its default, in the
order of their names; nested descriptions in brackets. A field that holds the matrix's own N or K says so by name, so
that matrices of all sizes under one scale per row have one signature. A field marked
:data:`qhub.layouts.base.UNMEASURED` is left out: what it changes has no measurements of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from qhub.layouts import Grid, Layout
from qhub.layouts.base import UNMEASURED

__all__ = ["signature"]

# A table of many entries (bands, records) is said by its digest.
_LONGEST = 200

_known: dict[Layout, str] = {}


def signature(layout: Layout) -> str:
    """Return the canonical string of ``layout`` without its N and K."""
    found = _known.get(layout)
    if found is None:
        size = (layout.out_features, layout.in_features)
        found = " ".join([layout.kind, *_fields(layout, size)])
        if len(found) > _LONGEST:
            found = f"{found[: _LONGEST - 20]}... {hashlib.sha256(found.encode()).hexdigest()[:16]}"
        _known[layout] = found
    return found


def _fields(value: Any, size: tuple[int, int]) -> list[str]:
    said = []
    for field in sorted(dataclasses.fields(value), key=lambda field: field.name):
        one = getattr(value, field.name)
        if field.name in ("out_features", "in_features") and isinstance(value, Layout):
            continue
        if field.metadata.get(UNMEASURED, False):
            continue
        if field.default is not dataclasses.MISSING and one == field.default:
            continue
        if field.default_factory is not dataclasses.MISSING and one == field.default_factory():
            continue
        said.append(f"{field.name}={_text(one, size)}")
    return said


def _text(value: Any, size: tuple[int, int]) -> str:
    if isinstance(value, Grid):
        rows = "N" if value.rows == size[0] and value.rows > 1 else value.rows
        return f"{value.kind}({rows},{'K' if value.cols == size[1] else value.cols})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = _fields(value, size)
        kind = getattr(value, "name", None) or type(value).__name__.lower()
        return f"{kind}({','.join(inner)})"
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_text(one, size) for one in value) + "]"
    if callable(value) or type(value).__repr__ is object.__repr__:
        # Never an address: it differs from process to process.
        return getattr(value, "name", None) or type(value).__name__
    return f"{value:.6g}" if isinstance(value, float) else str(value)
