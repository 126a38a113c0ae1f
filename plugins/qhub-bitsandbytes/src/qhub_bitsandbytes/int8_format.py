"""bitsandbytes' int8 entries: ``weight``, ``SCB`` and ``weight_format``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Affine, Layout
from qhub_bitsandbytes.entries import MARKERS, NAMES, check_entries, check_finite

__all__ = ["Int8Format"]

# bitsandbytes utils.py, LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING: the others are column orders of old GPUs, which 0.50.2
# refuses too.
_ROW_MAJOR = 0


class Int8Format(Format):
    """Translates LLM.int8() weights.

    ``weight`` (N, K) int8, ``SCB`` (N,) float32: the row's absmax, ``weight_format`` () uint8: 0 for row-major.
    """

    @property
    def markers(self) -> frozenset[str]:
        return MARKERS

    @property
    def names(self) -> frozenset[str]:
        return NAMES

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        return {
            "weight": Entry((layout.out_features, layout.in_features), (torch.int8,)),
            "SCB": Entry((layout.out_features,), (torch.float32,)),
            # Upstream, too, takes a file without it for row-major (nn/modules.py, maybe_rearrange_weight).
            "weight_format": Entry((), (torch.uint8,), required=False),
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        layout.validate(parts)
        if not isinstance(layout, Affine) or not layout.signed or layout.grid.cols != layout.in_features:
            raise LayoutError(
                f"bitsandbytes' int8 entries hold signed codes under a scale per row, this is {layout.describe()}"
            )
        return {
            "weight": parts["qweight"],
            "SCB": parts["scales"].reshape(layout.out_features).float(),
            "weight_format": torch.tensor(_ROW_MAJOR, dtype=torch.uint8, device="cpu"),
        }

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        check_entries(entries, self.entries(layout), "load_in_8bit")
        check_finite(entries, "SCB")
        order = int(entries["weight_format"]) if "weight_format" in entries else _ROW_MAJOR
        if order != _ROW_MAJOR:
            raise LayoutError(
                f"entry 'weight_format' is {order}, expected {_ROW_MAJOR} (row-major): load the model with the "
                "bitsandbytes release that wrote it and save it in row-major order"
            )
        return layout, {"qweight": entries["weight"], "scales": entries["SCB"].unsqueeze(1)}
