"""What another method's numbers become in a bitsandbytes checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from qhub.layouts import Affine, Layout, Lookup
from qhub.plan import Adoption, Skip
from qhub_bitsandbytes.layout import BLOCK_SIZE, blockwise, int8

__all__ = ["adopt"]


def adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    """Return a config for all of ``layouts``: int8 rows where all are symmetric bytes, else 4-bit codes into a table.

    A file of 4-bit codes holds its table, but upstream multiplies with its own NF4 and FP4: other tables are read by
    their values. ``others``: weights that stay dense. ``options``: config values, which win.
    """
    bytes_only = all(isinstance(layout, Affine) and layout.bits == 8 for layout in layouts.values())
    skip = [name.removesuffix(".weight") for name in others] or None
    values: dict[str, Any] = {"llm_int8_skip_modules": skip, **options}
    if bytes_only:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, **values)
        threshold = config.llm_int8_threshold
        rows: dict[str, Layout | Skip] = {
            name: int8(layout.out_features, layout.in_features, threshold) for name, layout in layouts.items()
        }
        return Adoption(config, rows)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **values})
    adopted: dict[str, Layout | Skip] = {}
    for name, layout in layouts.items():
        if isinstance(layout, Lookup) and layout.bits <= 4:
            nested = layout.scales_nested if config.bnb_4bit_use_double_quant else None
            size = math.gcd(layout.grid.cols, BLOCK_SIZE)
            if size != BLOCK_SIZE:
                adopted[name] = Skip(f"blocks of {layout.grid.cols} weights, bitsandbytes loads {BLOCK_SIZE}")
            else:
                adopted[name] = blockwise(layout.out_features, layout.in_features, nested)
        else:
            adopted[name] = Skip(f"its numbers are {layout.kind}, not codes into a table of 16 values")
    return Adoption(config, adopted)
