"""What a torchao config says of one weight: which of torchao's tensors holds it, and the layout that follows.

The formulas behind the layouts (torchao 0.18, ``quantization/quant_primitives.py``)::

    int8           w = scale * (q - zero)       int8 codes, float32 scales
    intx           w = scale * (q - zero)       codes of 1 to 8 bits, computed in the dtype of the scales
    float8         w = scale * q
    int4, tiles    w = scale * (q - 8) + zero   unsigned 4-bit codes; the zero is a float
    words          w = scale * (q - zero)       unsigned 4-bit codes, whole zeros
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from qhub.layouts import Activation, Affine, Float8, Grid, Layout

__all__ = ["TILE_K", "Grain", "Settings", "Storage"]

Storage = Literal["int8", "intx", "float8", "int4", "tiles", "words"]

# tinygemm's tiles hold 1024 input features, to which a row is filled up.
TILE_K = 1024


@dataclass(frozen=True)
class Grain:
    """Says which weights share a scale.

    ``kind``: ``"tensor"``, ``"row"`` (the dimension ``sizes[0]`` is summed up), ``"axis"`` (the dimension ``sizes[0]``
    is kept), ``"group"`` (``sizes[0]`` neighbours along K) or ``"block"`` (``sizes``: rows, columns).
    """

    kind: Literal["tensor", "row", "axis", "group", "block"]
    sizes: tuple[int, ...] = ()

    def block(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return rows and columns under one scale. Source: ``get_block_size``, torchao 0.18, quantization/utils.py."""
        if self.kind == "tensor":
            return out_features, in_features
        if self.kind in ("group", "block"):
            return (1, self.sizes[0]) if self.kind == "group" else (self.sizes[0], self.sizes[1])
        summed = self.sizes[0] % 2 if self.kind == "row" else 1 - self.sizes[0] % 2
        return (1, in_features) if summed == 1 else (out_features, 1)


@dataclass(frozen=True)
class Settings:
    """Is how a weight is quantized and stored.

    ``storage``: which of torchao's tensors (see above). ``mapping``: ``"symmetric"``, ``"symmetric_no_clipping_err"``
    or ``"asymmetric"``. ``algorithm``: of the scales: ``"affine"``, ``"tinygemm"``, ``"hqq"`` or ``"hqq_scale_only"``.
    ``scale_dtype``: torch's name; None: the weight's own. ``reduced``: 7 of 8 bits are used. ``format``: of float8
    codes. ``activation``: how inputs are rounded. ``said``: what headers repeat of the config, as JSON.
    """

    storage: Storage
    grain: Grain
    bits: int = 8
    mapping: str = "symmetric"
    algorithm: str = "affine"
    scale_dtype: str | None = None
    reduced: bool = False
    format: Literal["e4m3fn", "e5m2"] = "e4m3fn"
    activation: Activation = field(default_factory=Activation)
    said: str = "{}"

    @property
    def code_range(self) -> tuple[int, int]:
        """Return the smallest and largest code as torchao counts them: from -2**(bits-1), unsigned for int4."""
        if self.storage in ("tiles", "words"):
            return 0, 15
        half = 2 ** (self.bits - 1)
        return (-half // 2, (half - 1) // 2) if self.reduced else (-half, half - 1)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Return why a weight of that size cannot be stored so; None when it can."""
        rows, cols = self.grain.block(out_features, in_features)
        if out_features % rows or in_features % cols:
            return (
                f"groups of {rows}x{cols} do not divide its {out_features}x{in_features} weights: choose a group_size "
                "that does"
            )
        if self.storage in ("int4", "words") and in_features % (2 if self.storage == "int4" else 8):
            return f"its {in_features} input features do not fill whole words of 4-bit codes"
        if self.storage == "tiles" and TILE_K % cols:
            return f"groups of {cols} do not divide tinygemm's tiles of {TILE_K} input features"
        if self.storage == "float8" and self.activation.kind == "float8" and (out_features % 16 or in_features % 16):
            # _fp8_mm_compat, torchao 0.18, quantization/utils.py
            return f"float8 products want multiples of 16, it is {out_features}x{in_features}"
        return None

    def layout(self, out_features: int, in_features: int) -> Layout:
        """Return the layout of a weight that :meth:`misfit` has nothing against."""
        rows, cols = self.grain.block(out_features, in_features)
        common: dict[str, Any] = {
            "out_features": out_features,
            "in_features": in_features,
            "grid": Grid("block", rows, cols),
            "activation": self.activation,
        }
        if self.storage == "float8":
            return Float8(format=self.format, **common)
        if self.storage in ("int4", "tiles"):
            return Affine(bits=4, zero="offset", zero_point=8.0, **common)
        if self.storage == "words":
            return Affine(bits=4, zero="value", **common)
        zero: Literal["value", "constant"] = "value" if self.mapping == "asymmetric" else "constant"
        signed = self.bits == 8
        point = 0.0 if signed or zero == "value" else float(2 ** (self.bits - 1))
        # torchao multiplies an intx weight in the wider of two dtypes, its own and the scales': its own, as a rule.
        math: Literal["scales", "float32"] = (
            "scales" if self.storage == "intx" and self.scale_dtype is None else "float32"
        )
        return Affine(bits=self.bits, signed=signed, zero=zero, zero_point=point, math=math, **common)

    def holds(self, layout: Layout) -> bool:
        """Return whether ``layout`` is one of these settings' own.

        Input scales may be added; inputs may be left alone (those of embeddings); zeros may have turned out constant.
        """
        if self.misfit(layout.out_features, layout.in_features) is not None:
            return False
        own = self.layout(layout.out_features, layout.in_features)
        if layout.activation.kind == "none":
            own = dataclasses.replace(own, activation=Activation())
        bare = dataclasses.replace(layout, transforms=())
        if self.storage in ("int8", "intx") and isinstance(bare, Affine) and isinstance(own, Affine):
            if bare.zero == "offset":
                return False
            bare = dataclasses.replace(bare, zero=own.zero, zero_point=own.zero_point)
        return bare == own
