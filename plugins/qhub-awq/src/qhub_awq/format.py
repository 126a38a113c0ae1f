"""AWQ's checkpoint entries, four variants; G = K / group_size groups.

``gemm``, source ``WQLinear_GEMM`` of autoawq 0.2.9, ``AWQuantLinear`` of gptqmodel 7.7, the first llm-awq::

    qweight (K, N/8) int32, qzeros (G, N/8) int32: columns in words; scales (G, N) float16

``gemv``, source ``WQLinear_GEMV`` of autoawq 0.2.9; Z: G in words of 8, rounded up, see :func:`zeros_width`::

    qweight (N, K/8) int32, qzeros (N, Z) int32: nibbles along K; scales (N, 8*Z) float16; zeros behind G

``gemv_fast``, source ``WQLinear_GEMVFast`` of autoawq 0.2.9; ``llm-awq``, source ``WQLinear`` of llm-awq
(awq/quantize/qmodule.py): the same with ``scaled_zeros`` for ``qzeros``::

    qweight (N/4, K) int16: interleaved rows; scales (8*Z, N) float16; qzeros (8*Z, N) float16: -(scale * zero), rounded

An entry of qhub's own, absent otherwise: ``in_scale`` (K,) float, by which the layer's input is multiplied first. It is
written where AWQ's scales found no operation to fold into; upstream libraries cannot read such a layer. A layer's bias
is a tensor like any other and no part of this.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Affine, Layout, Transform
from qhub.layouts.packing import pack, unpack
from qhub_awq.words import LANES, columns, columns_to_words, interleaved, rows_to_interleaved

__all__ = ["IN_SCALE", "AwqFormat", "format_of", "zeros_width"]

IN_SCALE = (Transform("scale", "in"),)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def format_of(config: Any) -> AwqFormat:
    """Return the format that ``config.format`` names."""
    if config.format == "gemm":
        return _Gemm()
    if config.format == "gemv":
        return _Gemv()
    return _Fast("scaled_zeros" if config.format == "llm-awq" else "qzeros")


def zeros_width(in_features: int, group_size: int) -> int:
    """Return how many words hold the zeros of a row: a multiple of 1, 2, 4 for groups of 128 and more, 64, 32.

    Source: ``calculate_zeros_width`` of llm-awq (awq/quantize/qmodule.py).
    """
    words = math.ceil(in_features // group_size / 8)
    multiple = {32: 4, 64: 2}.get(group_size, 1)
    return math.ceil(words / multiple) * multiple


class AwqFormat(Format):
    """Is what the variants share: the input scale, and checks of what a file holds."""

    zeros_name = "qzeros"

    @abstractmethod
    def own_entries(self, layout: Affine) -> Mapping[str, Entry]:
        """Return the entries of the variant."""

    @abstractmethod
    def own_pack(self, layout: Affine, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the variant's entries for ``parts``."""

    @abstractmethod
    def own_unpack(self, layout: Affine, entries: Mapping[str, Tensor]) -> tuple[Affine, dict[str, Tensor]]:
        """Return layout and parts for the variant's ``entries``, which have the declared shapes."""

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({"qweight"})

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"qweight", self.zeros_name, "scales", "in_scale"})

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        assert isinstance(layout, Affine)
        scale = Entry((layout.in_features,), _FLOATS, required=bool(layout.transforms))
        return {**self.own_entries(layout), "in_scale": scale}

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(layout, Affine)
        packed = self.own_pack(layout, parts)
        return {**packed, "in_scale": parts["in_scale"].contiguous()} if layout.transforms else packed

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        """Return layout and parts; the file says whether the layer has an input scale, and which zeros it has.

        A layer planned symmetric whose zeros are not all 8 keeps them as a tensor.
        """
        assert isinstance(layout, Affine)
        n, k, group = layout.out_features, layout.in_features, layout.grid.cols
        self.check(
            layout,
            entries,
            f"a {n}x{k} weight in groups of {group}: config.json names another format or group size, or the file is "
            "damaged",
        )
        scaled = "in_scale" in entries
        found, parts = self.own_unpack(layout, entries)
        if scaled:
            parts["in_scale"] = entries["in_scale"].contiguous()
        return dataclasses.replace(found, transforms=IN_SCALE if scaled else ()), parts


class _Gemm(AwqFormat):
    def own_entries(self, layout: Affine) -> Mapping[str, Entry]:
        n, k = layout.out_features, layout.in_features
        groups = layout.scale_shape[1]
        return {
            "qweight": Entry((k, n // 8), (torch.int32,)),
            "qzeros": Entry((groups, n // 8), (torch.int32,)),
            "scales": Entry((groups, n), _FLOATS),
        }

    def own_pack(self, layout: Affine, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "qweight": columns_to_words(layout.codes(parts).t()),
            "qzeros": columns_to_words(_whole_zeros(layout, parts).t()),
            "scales": parts["scales"].t().contiguous(),
        }

    def own_unpack(self, layout: Affine, entries: Mapping[str, Tensor]) -> tuple[Affine, dict[str, Tensor]]:
        codes = layout.pack_codes(columns(entries["qweight"]).t())
        scales = entries["scales"].t().contiguous()
        return _with_zeros(layout, {"qweight": codes, "scales": scales}, columns(entries["qzeros"]).t())


class _Gemv(AwqFormat):
    def own_entries(self, layout: Affine) -> Mapping[str, Entry]:
        n, k = layout.out_features, layout.in_features
        width = zeros_width(k, layout.grid.cols)
        return {
            "qweight": Entry((n, k // 8), (torch.int32,)),
            "qzeros": Entry((n, width), (torch.int32,)),
            "scales": Entry((n, 8 * width), _FLOATS),
        }

    def own_pack(self, layout: Affine, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        width = 8 * zeros_width(layout.in_features, layout.grid.cols)
        return {
            "qweight": parts["qweight"].contiguous().view(torch.int32),
            "qzeros": pack(_wide(_whole_zeros(layout, parts), width), 4).view(torch.int32),
            "scales": _wide(parts["scales"], width),
        }

    def own_unpack(self, layout: Affine, entries: Mapping[str, Tensor]) -> tuple[Affine, dict[str, Tensor]]:
        groups = layout.scale_shape[1]
        zeros = unpack(entries["qzeros"].contiguous().view(torch.uint8), 4, groups)
        codes = entries["qweight"].contiguous().view(torch.uint8)
        return _with_zeros(layout, {"qweight": codes, "scales": entries["scales"][:, :groups].contiguous()}, zeros)


class _Fast(AwqFormat):
    """Stores -(scale * zero) as a rounded number and not the zero, so its layouts add it as it is."""

    def __init__(self, zeros_name: str) -> None:
        self.zeros_name = zeros_name

    def own_entries(self, layout: Affine) -> Mapping[str, Entry]:
        n, k = layout.out_features, layout.in_features
        padded = 8 * zeros_width(k, layout.grid.cols)
        return {
            "qweight": Entry((n // LANES, k), (torch.int16,)),
            self.zeros_name: Entry((padded, n), _FLOATS),
            "scales": Entry((padded, n), _FLOATS),
        }

    def own_pack(self, layout: Affine, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        padded = 8 * zeros_width(layout.in_features, layout.grid.cols)
        return {
            "qweight": rows_to_interleaved(layout.codes(parts)),
            self.zeros_name: _wide(parts["zeros"], padded).t().contiguous(),
            "scales": _wide(parts["scales"], padded).t().contiguous(),
        }

    def own_unpack(self, layout: Affine, entries: Mapping[str, Tensor]) -> tuple[Affine, dict[str, Tensor]]:
        groups = layout.scale_shape[1]
        return layout, {
            "qweight": layout.pack_codes(interleaved(entries["qweight"])),
            "scales": entries["scales"][:groups].t().contiguous(),
            "zeros": entries[self.zeros_name][:groups].t().contiguous(),
        }


def _whole_zeros(layout: Affine, parts: Mapping[str, Tensor]) -> Tensor:
    if layout.zero == "constant":
        return torch.full_like(parts["scales"], layout.zero_point, dtype=torch.uint8)
    zeros = parts["zeros"]
    if zeros.is_floating_point():
        whole = zeros.float().round()
        if not bool(((zeros == whole) & (whole >= 0) & (whole <= 15)).all()):
            raise LayoutError("the format stores zeros as whole numbers from 0 to 15, and tensor 'zeros' holds others")
        zeros = whole
    return zeros.to(torch.uint8)


def _with_zeros(layout: Affine, parts: dict[str, Tensor], zeros: Tensor) -> tuple[Affine, dict[str, Tensor]]:
    if layout.zero == "constant" and bool((zeros != int(layout.zero_point)).any()):
        layout = dataclasses.replace(layout, zero="value", zero_point=0.0)
    if layout.zero == "value":
        parts["zeros"] = zeros.contiguous()
    return layout, parts


def _wide(rows: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[-1])).contiguous()
