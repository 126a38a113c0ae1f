"""GPTQ's checkpoint entries: packed codes, packed zeros, scales, group indices.

Source: gptqmodel 7.7, ``GPTQQuantLinear`` (gptqmodel/nn_modules/qlinear/__init__.py); g = ceil(K / group_size) groups::

    qweight  (ceil(K*bits/32), N) int32: strings of bits along K
    qzeros   (g, ceil(N*bits/32)) int32: strings of bits along N; format v1 stores zero - 1
    scales   (g, N) float16
    g_idx    (K,) int32: the group of each input feature; some older writers leave it out where features lie in order

A layer's bias is a tensor like any other and no part of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.formats import Entry, Format
from qhub.layouts import Affine, Layout
from qhub.layouts.packing import pack, unpack
from qhub_gptq.order import group_index, permutation
from qhub_gptq.plan import ACT_ORDER
from qhub_gptq.words import bytes_to_words, pack_zeros, unpack_zeros, word_count, words_to_bytes

__all__ = ["GptqFormat"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_NAMES = ("qweight", "qzeros", "scales", "g_idx")


class GptqFormat(Format):
    """Translates between the parts of an affine layout and the entries of a GPTQ layer.

    ``v1``: zeros are stored less 1 (``gptq``); otherwise as they are (``gptq_v2``).
    """

    def __init__(self, v1: bool) -> None:
        self._v1 = v1

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({"qweight"})

    @property
    def names(self) -> frozenset[str]:
        return frozenset(_NAMES)

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        assert isinstance(layout, Affine)
        n, k, bits = layout.out_features, layout.in_features, layout.bits
        groups = layout.scale_shape[1]
        return {
            "qweight": Entry((word_count(k, bits), n), (torch.int32,)),
            "qzeros": Entry((groups, word_count(n, bits)), (torch.int32,)),
            "scales": Entry((groups, n), _FLOATS),
            # Without it a layer in act-order would decode to other weights.
            "g_idx": Entry((k,), (torch.int32,), required=bool(layout.transforms)),
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(layout, Affine)
        k, bits, group = layout.in_features, layout.bits, layout.grid.cols
        packed, perm = parts["qweight"], parts.get("in_perm")
        if perm is not None:
            back = torch.argsort(perm).to(torch.int64)
            packed = pack(unpack(packed, bits, k).index_select(-1, back), bits)
        if layout.zero == "constant":
            zeros = torch.full_like(parts["scales"], layout.zero_point, dtype=torch.uint8)
        else:
            zeros = parts["zeros"]
        return {
            "qweight": bytes_to_words(packed, bits, k).t().contiguous(),
            "qzeros": pack_zeros(zeros.t().contiguous(), bits, self._v1),
            "scales": parts["scales"].t().contiguous(),
            "g_idx": group_index(perm, k, group, packed.device),
        }

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        """Return layout and parts; what the file says of zeros and of the features' order refines the plan.

        A layer planned symmetric whose zeros are not all 2^(bits-1) keeps them as a tensor; one planned in act-order
        whose features lie in order needs no permutation, and the other way round.
        """
        assert isinstance(layout, Affine)
        self.check(layout, entries, f"{layout.bits} bits in groups of {layout.grid.cols}")
        n, k, bits = layout.out_features, layout.in_features, layout.bits
        packed = words_to_bytes(entries["qweight"].t(), bits, k)
        perm = permutation(entries["g_idx"], layout.grid.cols) if "g_idx" in entries else None
        if perm is not None:
            packed = pack(unpack(packed, bits, k).index_select(-1, perm.to(torch.int64)), bits)
        parts = {"qweight": packed, "scales": entries["scales"].t().contiguous()}
        zeros = unpack_zeros(entries["qzeros"], bits, n, self._v1)
        if layout.zero == "constant" and bool((zeros != int(layout.zero_point)).any()):
            layout = dataclasses.replace(layout, zero="value", zero_point=0.0)
        if layout.zero == "value":
            parts["zeros"] = zeros.t().contiguous()
        if perm is not None:
            parts["in_perm"] = perm
        return dataclasses.replace(layout, transforms=() if perm is None else ACT_ORDER), parts
