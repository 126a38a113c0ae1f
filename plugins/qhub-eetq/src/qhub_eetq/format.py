"""EETQ's checkpoint entries, as transformers' EetqLinear names them (transformers 5.23, integrations/eetq.py)::

weight         (K, N) int8, bytes interleaved, see :mod:`qhub_eetq.interleave`
weight_scales  (N,) float16
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Affine, Layout
from qhub_eetq.interleave import deinterleave, interleave
from qhub_eetq.plan import int8_rows, unfit

__all__ = ["EetqFormat"]

# Upstream's own scales have the dtype of the weights that it quantized, though its kernels take float16 only, which is
# what is written.
_READ = (torch.float16, torch.float32, torch.bfloat16)


class EetqFormat(Format):
    """Translates between int8 rows and the entries of transformers' EetqLinear."""

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({"weight_scales"})

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"weight", "weight_scales"})

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        return {
            "weight": Entry((layout.in_features, layout.out_features), (torch.int8,)),
            "weight_scales": Entry((layout.out_features,), _READ),
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        layout.validate(parts)
        n, k = layout.out_features, layout.in_features
        if not isinstance(layout, Affine) or layout != int8_rows(n, k):
            raise LayoutError(f"EETQ's entries hold signed bytes under a scale per row, this is {layout.describe()}")
        reason = unfit(n, k)
        if reason is not None:
            raise LayoutError(reason)
        scales = parts["scales"].to(torch.float16)
        if scales.device.type != "meta" and not torch.equal(scales.float(), parts["scales"].float()):
            raise LayoutError(
                "EETQ's kernels take scales of float16, which does not hold these exactly: quantize the model anew "
                "with eetq"
            )
        return {"weight": interleave(parts["qweight"]), "weight_scales": scales.reshape(n)}

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        self.check(layout, entries, "int8 weights per output channel")
        codes, scales = deinterleave(entries["weight"]), entries["weight_scales"].unsqueeze(1)
        if scales.device.type != "meta":
            _check_scales(codes, scales)
        return layout, {"qweight": codes, "scales": scales}


def _check_scales(codes: Tensor, scales: Tensor) -> None:
    """Raise :class:`LayoutError` for scales that no writer makes: magnitudes that are not finite, negative, or 0.

    A row of zeros has a scale of 0, but then all its codes are one: 127 from EETQ, 0 from qhub.
    """
    if not bool(torch.isfinite(scales).all()):
        raise LayoutError("entry 'weight_scales' holds NaN or infinity: the file is damaged")
    if bool((scales < 0).any()):
        row = int((scales < 0).flatten().nonzero()[0])
        raise LayoutError(
            f"entry 'weight_scales' holds {float(scales[row]):g} for output channel {row}, expected a magnitude: the "
            "file is damaged"
        )
    empty = (scales == 0).flatten().nonzero().flatten()
    torn = [int(row) for row in empty if bool((codes[row] != codes[row, 0]).any())]
    if torn:
        raise LayoutError(
            f"entry 'weight_scales' holds 0 for output channel {torn[0]}, whose codes are not those of a row of zeros: "
            "the file is damaged"
        )
