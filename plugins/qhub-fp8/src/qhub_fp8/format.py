"""The checkpoint entries of ``quant_method: fp8``, in the dialects that files have.

Written: those of transformers 5.17 and 5.23 (``FP8Linear`` of integrations/finegrained_fp8.py) and of DeepSeek-V3::

    weight            float8_e4m3fn or float8_e5m2 (N, K)
    weight_scale_inv  float32 or float8_e8m0fnu (ceil(N / rows), ceil(K / cols)), () for one scale: multiplies
    activation_scale  float32 (): static scale of the inputs, multiplies

Read besides: ``weight_scale`` and ``input_scale`` of AutoFP8, vLLM and NVIDIA (one number, or one a row),
``qscale_weight`` and ``qscale_act`` of Mistral; E8M0 scales kept as uint8; experts of DeepSeek-V4 in E2M1, two to a
byte (int8, low nibble first) under E8M0 scales for 32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Activation, Float8, Grid, Layout, Lookup
from qhub.layouts.float4 import float4_table
from qhub_fp8.entries import FLOATS, one_of, positive_scale, scalar
from qhub_fp8.settings import Codes, Settings

__all__ = ["CODES", "Fp8Format"]

_SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight")
_INPUT_SCALES = ("activation_scale", "input_scale", "qscale_act")
CODES: Mapping[torch.dtype, Codes] = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e5m2: "e5m2"}


class Fp8Format(Format):
    """Translates between a float8 layout and the entries that transformers' ``FP8Linear`` reads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @property
    def markers(self) -> frozenset[str]:
        return frozenset(_SCALES)

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"weight", *_SCALES, *_INPUT_SCALES})

    @property
    def passengers(self) -> frozenset[str]:
        # Scales of the key-value cache (AutoFP8, ModelOpt, vLLM's Attention layers).
        return frozenset({"k_scale", "v_scale", "kv_scale", "q_scale", "prob_output_scale"})

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        n, k = layout.out_features, layout.in_features
        packed = isinstance(layout, Lookup)
        weight = Entry((n, k // 2), (torch.int8, torch.uint8)) if packed else Entry((n, k), tuple(CODES))
        scales = (*FLOATS, torch.float8_e8m0fnu, torch.uint8)
        # Files of one method have one scale, one a row or one a block: unpack compares the shapes.
        return {
            "weight": weight,
            **{name: Entry(None, scales, required=False) for name in _SCALES},
            **{name: Entry(None, FLOATS, required=False) for name in _INPUT_SCALES},
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        scales = parts["scales"]
        if scales.dtype in (torch.float16, torch.bfloat16):
            # transformers has float32 for them, which holds what 16 bits do.
            scales = scales.float()
        if isinstance(layout, Lookup):
            weight = parts["qweight"].view(torch.int8)
        else:
            assert isinstance(layout, Float8)
            weight = parts["qweight"]
            if self._settings.block is None and scales.numel() == 1:
                scales = scales.reshape(())
        entries = {"weight": weight, "weight_scale_inv": scales}
        if layout.activation.static:
            entries["activation_scale"] = parts["input_scale"]
        return entries

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        name = one_of(entries, _SCALES)
        if name is None or "weight" not in entries:
            raise LayoutError(
                f"a weight in 8-bit floats needs the entries weight and one of {list(_SCALES)}; found {sorted(entries)}"
            )
        scale = entries[name]
        if scale.dtype == torch.uint8:
            # The exponents of powers of two, as bytes (MXFP8 files; transformers 5.23,
            # FineGrainedFP8HfQuantizer._process_model_after_weight_loading).
            scale = scale.view(torch.float8_e8m0fnu)
        positive_scale(name, scale)
        if isinstance(layout, Lookup):
            stored, parts = self._float4(layout, entries["weight"], name, scale)
        else:
            stored, parts = self._float8(layout, entries["weight"], name, scale)
        return self._with_input_scale(stored, parts, entries)

    def _float4(self, layout: Lookup, weight: Tensor, name: str, scale: Tensor) -> tuple[Layout, dict[str, Tensor]]:
        expected = (layout.out_features, layout.in_features // 2)
        if weight.element_size() != 1 or tuple(weight.shape) != expected:
            raise LayoutError(f"entry 'weight' is {weight.dtype} {tuple(weight.shape)}, expected int8 {expected}")
        if tuple(scale.shape) != layout.scale_shape:
            raise LayoutError(
                f"entry {name!r} has shape {tuple(scale.shape)}, expected {layout.scale_shape}: one scale for each "
                f"{layout.grid.cols} weights of a row"
            )
        return layout, {"qweight": weight.view(torch.uint8), "scales": scale, "table": float4_table(weight.device)}

    def _float8(self, layout: Layout, weight: Tensor, name: str, scale: Tensor) -> tuple[Layout, dict[str, Tensor]]:
        assert isinstance(layout, Float8)
        n, k = layout.out_features, layout.in_features
        if weight.dtype not in CODES or tuple(weight.shape) != (n, k):
            raise LayoutError(
                f"entry 'weight' is {weight.dtype} {tuple(weight.shape)}, expected float8_e4m3fn or float8_e5m2 "
                f"{(n, k)}"
            )
        grid = self._grid(layout, name, scale)
        stored = dataclasses.replace(layout, format=CODES[weight.dtype], grid=grid)
        return stored, {"qweight": weight, "scales": scale.reshape(stored.scale_shape)}

    def _grid(self, layout: Float8, name: str, scale: Tensor) -> Grid:
        """Return which weights share a scale: as planned, or one for all, or one a row where the file has so many."""
        n, k = layout.out_features, layout.in_features
        shape = tuple(scale.shape)
        if scale.numel() == 1:
            # Also where one block covers the whole matrix.
            return (
                layout.grid
                if layout.scale_shape == (1, 1)
                else self._unless_planned(layout, Grid("block", n, k), shape)
            )
        if shape == layout.scale_shape:
            return layout.grid
        if shape in ((n,), (n, 1)):
            return self._unless_planned(layout, Grid("block", 1, k), shape)
        raise LayoutError(self._misfit(layout, name, shape))

    def _unless_planned(self, layout: Float8, grid: Grid, shape: tuple[int, ...]) -> Grid:
        if self._settings.block is not None:
            raise LayoutError(self._misfit(layout, "weight_scale_inv", shape))
        return grid

    def _misfit(self, layout: Float8, name: str, shape: tuple[int, ...]) -> str:
        block = self._settings.block
        said = f"weight_block_size={list(block)}" if block else "no weight_block_size (one scale, or one a row)"
        return (
            f"entry {name!r} has shape {shape}, expected {layout.scale_shape} for a weight of "
            f"{layout.out_features}x{layout.in_features} and {said}"
        )

    def _with_input_scale(
        self, layout: Layout, parts: dict[str, Tensor], entries: Mapping[str, Tensor]
    ) -> tuple[Layout, dict[str, Tensor]]:
        name = one_of(entries, _INPUT_SCALES)
        if not layout.activation.static:
            # vLLM and transformers leave a stored scale alone where the config says dynamic.
            return layout, parts
        if name is None:
            raise LayoutError(
                f"activation_scheme is static, but none of the entries {list(_INPUT_SCALES)} is there; found "
                f"{sorted(entries)}"
            )
        static = Activation(kind="float8", granularity="tensor", static=True)
        return dataclasses.replace(layout, activation=static), {**parts, "input_scale": scalar(name, entries[name])}
