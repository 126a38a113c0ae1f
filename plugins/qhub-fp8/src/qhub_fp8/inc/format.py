"""The checkpoint entries that Intel Neural Compressor writes and reads (``save`` and ``load`` of its fp8_quant).

Of a layer ``X`` (``PatchedLinearBase`` of _quant_common/helper_modules.py; scales in the config's ``hp_dtype``)::

    weight                float8 (K, N): transposed
    scale_weight          () or (N,): multiplies
    scale_input           (): static scale of the inputs, multiplies
    quant_input.scale_inv its reciprocal

With ``use_qdq``, the only mode that the library has on a CPU, the scales are ``dequant_weights.scale`` and
``quant_input.scale``. Either is read whatever the config says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Float8, Layout
from qhub_fp8.entries import FLOATS, one_of, positive_scale, scalar

__all__ = ["IncFormat"]

_SCALES = ("scale_weight", "dequant_weights.scale")
_INPUT_SCALES = ("scale_input", "quant_input.scale")
# Said twice: reciprocals, and zeros that floats have no use for.
_RECIPROCALS = ("quant_input.scale_inv", "dequant_weights.scale_inv")
_ZEROS = ("quant_input.zero_point", "dequant_weights.zero_point", "dequant_output.zero_point")
_COMPANIONS = (*_RECIPROCALS, *_ZEROS)


class IncFormat(Format):
    """Translates between float8 layouts and the entries of a ``PatchedLinear``.

    ``dtype``: of its scales. ``qdq``: it is written with the names of the QDQ mode.
    """

    def __init__(self, dtype: torch.dtype, qdq: bool = False) -> None:
        self._dtype = dtype
        self._names = (_SCALES[qdq], _INPUT_SCALES[qdq])

    @property
    def markers(self) -> frozenset[str]:
        return frozenset(_SCALES)

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"weight", *_SCALES, *_INPUT_SCALES, *_COMPANIONS})

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        assert isinstance(layout, Float8)
        optional = (*_SCALES, *_INPUT_SCALES, *_COMPANIONS)
        return {
            "weight": Entry((layout.in_features, layout.out_features), (layout.dtype,)),
            **{name: Entry(None, FLOATS, required=False) for name in optional},
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        scales = parts["scales"].to(self._dtype)
        entries = {
            "weight": parts["qweight"].t().contiguous(),
            self._names[0]: scales.reshape(()) if scales.numel() == 1 else scales.reshape(-1),
        }
        if layout.activation.static:
            scale = parts["input_scale"].to(self._dtype)
            entries |= {self._names[1]: scale, "quant_input.scale_inv": scale.reciprocal()}
        return entries

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        assert isinstance(layout, Float8)
        self.check(layout, entries, "an inc config")
        name = one_of(entries, _SCALES)
        if name is None:
            raise LayoutError(f"a weight of inc needs one of the entries {list(_SCALES)}; found {sorted(entries)}")
        for other in _RECIPROCALS:
            if other in entries:
                positive_scale(other, entries[other])
        for other in _ZEROS:
            if other in entries and entries[other].device.type != "meta" and bool((entries[other].float() != 0).any()):
                raise LayoutError(f"entry {other!r} holds something else than 0, which 8-bit floats have no use for")
        scales = positive_scale(name, entries[name])
        count = layout.scale_shape[0]
        if scales.numel() != count:
            raise LayoutError(
                f"entry {name!r} has shape {tuple(scales.shape)}, expected {count} scales, one for each "
                f"{layout.grid.rows} output features"
            )
        parts = {
            "qweight": entries["weight"].t().contiguous(),
            "scales": scales.to(self._dtype).reshape(layout.scale_shape),
        }
        if layout.activation.static:
            own = one_of(entries, _INPUT_SCALES)
            if own is None:
                raise LayoutError(
                    f"a weight of inc with static inputs needs one of the entries {list(_INPUT_SCALES)}; found "
                    f"{sorted(entries)}"
                )
            parts["input_scale"] = scalar(own, entries[own])
        return layout, parts
