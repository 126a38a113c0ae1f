"""aqlm's checkpoint entries: codes, codebooks, scales.

Source: aqlm 1.1.7, ``QuantizedLinear`` (aqlm/inference.py); two's complement, ``pack_int_data`` (aqlm/utils.py)::

    codes      (N/out_group, K/in_group, C) int8 up to 8 bits, else int16: two's complement of the code
    codebooks  (C, 2**nbits, out_group, in_group) float
    scales     (N/out_group, 1, 1, 1) float
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.formats import Entry, Format
from qhub.layouts import Codebook, Layout

__all__ = ["AqlmFormat"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class AqlmFormat(Format):
    """Translates between the parts of a codebook layout and the entries that aqlm's ``QuantizedLinear`` holds."""

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({"codes"})

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"codes", "codebooks", "scales"})

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        assert isinstance(layout, Codebook)
        specs = layout.core_specs()
        return {
            "codes": Entry(specs["codes"].shape, specs["codes"].dtypes),
            "codebooks": Entry(specs["codebooks"].shape, _FLOATS),
            "scales": Entry(_file_scales(layout), _FLOATS),
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(layout, Codebook)
        return {
            "codes": parts["codes"],
            "codebooks": parts["codebooks"],
            "scales": parts["scales"].reshape(_file_scales(layout)),
        }

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        assert isinstance(layout, Codebook)
        self.check(layout, entries, f"{len(layout.nbits)} codebooks of {layout.nbits[0]} bits")
        parts = {
            "codes": entries["codes"],
            "codebooks": entries["codebooks"],
            "scales": entries["scales"].reshape(layout.scale_shape),
        }
        if layout.nbits[0] not in (8, 16):
            # Codes of 8 and 16 bits fill their integers: none can be outside.
            layout.check_values(parts)
        return layout, parts


def _file_scales(layout: Codebook) -> tuple[int, ...]:
    return (layout.out_features // layout.out_group, 1, 1, 1)
