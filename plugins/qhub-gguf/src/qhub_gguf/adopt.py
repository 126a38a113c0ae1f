"""What another method's numbers become in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub.layouts import Affine, Layout, Lookup
from qhub.layouts.blocks import Blocks
from qhub.plan import Adoption, Skip
from qhub_gguf.config import GgufQuantConfig
from qhub_gguf.records import record_of

__all__ = ["adopt"]

# One scale, and with the second also a minimum, for 32 weights: the types of ggml that are nothing but that.
_SYMMETRIC = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
_ASYMMETRIC = {4: "Q4_1", 5: "Q5_1"}
_FILE_TYPES = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}


def adopt(layouts: Mapping[str, Layout], options: Mapping[str, Any]) -> Adoption:
    """Return blocks of 32 weights for each of ``layouts``; ``options``: config values."""
    adopted: dict[str, Layout | Skip] = {}
    for name, layout in layouts.items():
        kind = _type_of(layout)
        if kind is None:
            adopted[name] = Skip(f"no type of ggml holds {layout.kind} numbers of this kind")
        elif layout.in_features % record_of(kind).count:
            adopted[name] = Skip(f"{kind} holds runs of 32 weights, its rows have {layout.in_features}")
        else:
            adopted[name] = Blocks(
                out_features=layout.out_features, in_features=layout.in_features, record=record_of(kind)
            )
    used = {one.record.name for one in adopted.values() if isinstance(one, Blocks)} & _FILE_TYPES
    values: dict[str, Any] = {"file_type": used.pop() if len(used) == 1 else "Q8_0", **options}
    return Adoption(GgufQuantConfig(**values), adopted)


def _type_of(layout: Layout) -> str | None:
    if isinstance(layout, Affine):
        middle = 0 if layout.signed else 2 ** (layout.bits - 1)
        symmetric = layout.zero == "constant" and layout.zero_point == middle
        table = _SYMMETRIC if symmetric else _ASYMMETRIC
        return next((name for bits, name in sorted(table.items()) if bits >= layout.bits), None)
    if isinstance(layout, Lookup) and layout.bits == 4:
        return "MXFP4" if layout.scales_nested is None and layout.grid.cols == 32 else "IQ4_NL"
    return None
