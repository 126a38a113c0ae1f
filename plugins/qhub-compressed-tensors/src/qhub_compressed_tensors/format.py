"""The checkpoint entries of every format: packed integers, integers and floats of a byte, 4- and 6-bit floats.

Sources, all compressed-tensors 0.20: ``pack_quantized/base.py``, ``naive_quantized/base.py`` (which int-quantized and
float-quantized share), ``nvfp4/base.py``, ``mxfp4/base.py``, ``mxfp6/base.py``, ``mxfp8/base.py``, ``dense/base.py``
under compressed_tensors/compressors. With G groups in a row of K::

    pack-quantized   weight_packed (N, ceil(K*b/32)) int32: strings of bits along K, code + 2^(b-1); weight_shape (2,);
                     weight_zero_point (ceil(N*b/32), G) int32: the same along N; weight_g_idx (K,) int32
    int-quantized    weight (N, K) int8; weight_zero_point like the scales, int8
    float-quantized  weight (N, K) E4M3
    mxfp8-quantized  the same, weight_scale uint8: exponents + 127
    nvfp4            weight_packed (N, K/2) uint8, low nibble first; weight_scale (N, K/16) E4M3; weight_global_scale
                     (1,), which divides
    mxfp4, mxfp6     weight_packed (N, K/2) or (N, 3K/4) uint8: strings of bits; weight_scale (N, K/32) uint8: exponents
    dense            weight (N, K) of a float dtype, rounded when it is read; entries of scales and zeros like int8's
    all              weight_scale: (1,) for one of all, (N, 1) for rows, (N, G), or of blocks; see also inputs.py

A layer's bias is a tensor like any other and no part of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Affine, Float8, Layout, Lookup
from qhub.layouts.float4 import float4_table
from qhub_compressed_tensors.inputs import FLOATS, entries_of_inputs, one_value, pack_inputs, unpack_inputs
from qhub_compressed_tensors.layout import ORDER, PlainAffine, check_zeros, has_one_scale
from qhub_compressed_tensors.order import group_index, permutation
from qhub_compressed_tensors.words import codes_of_words, old_word_count, word_count, words_of_codes

__all__ = ["CompressedTensorsFormat", "float6_table"]

_NAMES = (
    "input_global_scale", "input_scale", "input_zero_point", "weight", "weight_g_idx", "weight_global_scale",
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point",
)  # fmt: skip
# Scales and zeros of the cache and of attention, which belong to modules without a weight of their own.
_CACHE = tuple(f"{what}_{kind}" for what in "qkv" for kind in ("scale", "zero_point", "global_scale"))
_EXPERTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_LENGTHS = (torch.int64, torch.int32)


class CompressedTensorsFormat(Format):
    """Translates between layouts and the entries of a layer; the layout tells which format it is.

    ``dense``: weights lie in the file as floats.
    """

    def __init__(self, dense: bool = False) -> None:
        self._dense = dense

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({"weight_packed", "weight_scale"})

    @property
    def names(self) -> frozenset[str]:
        return frozenset(_NAMES)

    @property
    def passengers(self) -> frozenset[str]:
        return frozenset(_CACHE)

    def aliases(self, prefix: str) -> Iterable[str]:
        # llm-compressor 0.14 writes Mixtral's experts under the names that other models have for theirs.
        parent, _, leaf = prefix.rpartition(".")
        return [f"{parent}.{_EXPERTS[leaf]}"] if leaf in _EXPERTS and ".experts." in parent else []

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        n, k = layout.out_features, layout.in_features
        entries = entries_of_inputs(layout.activation)
        if isinstance(layout, Lookup):
            width = 2 if layout.bits == 4 else 4
            if k % width:
                raise LayoutError(f"rows of {k} floats of {layout.bits} bits do not fill whole bytes")
            dtypes: tuple[torch.dtype, ...] = (torch.uint8,)
            if layout.scales_nested is not None:
                entries["weight_global_scale"] = Entry(None, FLOATS)
                dtypes = (torch.float8_e4m3fn,)
            entries["weight_packed"] = Entry((n, k * layout.bits // 8), (torch.uint8,))
            return {**entries, "weight_scale": Entry(layout.scale_shape, dtypes)}
        assert isinstance(layout, Affine | Float8)
        whole = has_one_scale(layout)
        shape = None if whole else layout.scale_shape
        scales: tuple[torch.dtype, ...] = FLOATS
        if isinstance(layout, Float8) and layout.grid.cols == 32 and layout.grid.rows == 1:
            scales = (*FLOATS, torch.uint8)
        entries["weight_scale"] = Entry(shape, scales)
        if isinstance(layout, Affine) and _is_packed(layout) and not self._dense:
            entries |= self._packed_entries(layout)
        else:
            stored = layout.dtype if isinstance(layout, Float8) else torch.int8
            entries["weight"] = Entry((n, k), FLOATS if self._dense else (stored,))
            asymmetric = isinstance(layout, Affine) and layout.zero == "value"
            # Older files have zeros of 0 for symmetric weights too.
            dtypes = (torch.int8,) if isinstance(layout, Affine) else (torch.int8, torch.float8_e4m3fn)
            entries["weight_zero_point"] = Entry(shape, dtypes, required=asymmetric)
        return entries

    def _packed_entries(self, layout: Affine) -> dict[str, Entry]:
        n, k, bits = layout.out_features, layout.in_features, layout.bits
        one_packing = word_count(k, bits) == old_word_count(k, bits)
        entries = {
            "weight_packed": Entry((n, word_count(k, bits)) if one_packing else None, (torch.int32,)),
            "weight_shape": Entry((2,), _LENGTHS),
        }
        if layout.zero == "value":
            groups = layout.scale_shape[1]
            one_packing = word_count(n, bits) == old_word_count(n, bits)
            packed = Entry((word_count(n, bits), groups) if one_packing else None, (torch.int32,))
            entries["weight_zero_point"] = Entry(None, (torch.int8,)) if has_one_scale(layout) else packed
        if layout.transforms or layout.grid.cols < k:
            # Without it a layer in act-order would decode to other weights.
            entries["weight_g_idx"] = Entry((k,), (torch.int32,), required=bool(layout.transforms))
        return entries

    # -- reading -----------------------------------------------------------------------------------------------------

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        """Return layout and parts; features that lie in order need no permutation, and the other way round."""
        self.check(layout, entries, f"{layout.kind} codes of {layout.out_features}x{layout.in_features}")
        inputs = unpack_inputs(layout.activation, entries)
        if isinstance(layout, Lookup):
            return layout, {**self._read_floats(layout, entries), **inputs}
        assert isinstance(layout, Affine | Float8)
        parts = {"scales": _read_scale(layout, entries["weight_scale"])}
        if self._dense:
            parts |= _read_zeros(layout, entries)
            rounded = layout.nearest(entries["weight"].float(), parts)
            return layout, {**rounded, **parts, **inputs}
        if isinstance(layout, Float8):
            _read_zeros(layout, entries)
            return layout, {"qweight": entries["weight"].contiguous(), **parts, **inputs}
        if not _is_packed(layout):
            codes = entries["weight"]
            if not layout.signed:
                _check_codes(layout, codes)
                codes = layout.pack_codes(codes.to(torch.int16) + _offset(layout))
            return layout, {"qweight": codes.contiguous(), **parts, **_read_zeros(layout, entries), **inputs}
        packed, core = self._read_packed(layout, entries)
        return packed, {**parts, **core, **inputs}

    def _read_packed(self, layout: Affine, entries: Mapping[str, Tensor]) -> tuple[Affine, dict[str, Tensor]]:
        n, k, bits = layout.out_features, layout.in_features, layout.bits
        shape = entries["weight_shape"].tolist()
        if shape != [n, k]:
            raise LayoutError(f"entry 'weight_shape' says {shape}, the model's weight is {[n, k]}")
        codes = codes_of_words(_with_words("weight_packed", entries, (n,), k, bits), bits, k)
        parts = {}
        perm = permutation(entries["weight_g_idx"], layout.grid.cols) if "weight_g_idx" in entries else None
        if perm is not None:
            codes = codes.index_select(-1, perm.to(torch.int64))
            parts["in_perm"] = perm
        parts["qweight"] = layout.pack_codes(codes)
        if layout.zero == "value":
            if has_one_scale(layout):
                parts |= _read_zeros(layout, entries)
            else:
                words = _with_words("weight_zero_point", entries, (layout.scale_shape[1],), n, bits, along=0)
                parts["zeros"] = codes_of_words(words, bits, n).t().contiguous()
        return dataclasses.replace(layout, transforms=() if perm is None else ORDER), parts

    def _read_floats(self, layout: Lookup, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        packed, scale = entries["weight_packed"], entries["weight_scale"].contiguous()
        parts = {"qweight": packed.contiguous(), "table": _table(layout, packed.device)}
        if layout.scales_nested is None:
            return {**parts, "scales": scale.view(torch.float8_e8m0fnu)}
        over = one_value("weight_global_scale", entries)
        if not bool(over > 0):
            raise LayoutError(f"entry 'weight_global_scale' is {float(over)}: it divides, and is above zero")
        return {**parts, "scales": scale, "scales_super": over.reshape(1)}

    # -- writing -----------------------------------------------------------------------------------------------------

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        scales = parts["scales"]
        inputs = pack_inputs(layout.activation, parts, scales.dtype if scales.dtype in FLOATS else dtype)
        if isinstance(layout, Lookup):
            stored = {"weight_packed": parts["qweight"].clone()}
            if layout.scales_nested is None:
                return {**stored, "weight_scale": scales.contiguous().view(torch.uint8), **inputs}
            over = parts["scales_super"].reshape(1).clone()
            return {**stored, "weight_scale": scales.contiguous(), "weight_global_scale": over, **inputs}
        assert isinstance(layout, Affine | Float8)
        if scales.dtype == torch.float8_e8m0fnu:
            scales = scales.contiguous().view(torch.uint8)
        entries = {"weight_scale": scales.reshape(1) if has_one_scale(layout) else scales.contiguous(), **inputs}
        if self._dense:
            return {**entries, "weight": layout.decode(parts).to(dtype), **_written_zeros(layout, parts)}
        if isinstance(layout, Float8):
            return {**entries, "weight": parts["qweight"].contiguous()}
        if not _is_packed(layout):
            codes = layout.codes(parts)
            codes = codes if layout.signed else (codes.to(torch.int16) - _offset(layout)).to(torch.int8)
            return {**entries, "weight": codes.contiguous(), **_written_zeros(layout, parts)}
        return {**entries, **self._packed(layout, parts)}

    def _packed(self, layout: Affine, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n, k, bits = layout.out_features, layout.in_features, layout.bits
        codes, perm = layout.codes(parts), parts.get("in_perm")
        entries = {"weight_shape": torch.tensor([n, k], dtype=torch.int64)}
        if perm is not None:
            codes = codes.index_select(-1, torch.argsort(perm).to(torch.int64))
            entries["weight_g_idx"] = group_index(perm, k, layout.grid.cols, codes.device)
        entries["weight_packed"] = words_of_codes(codes, bits)
        if layout.zero == "value":
            if has_one_scale(layout):
                entries |= _written_zeros(layout, parts)
            else:
                check_zeros(layout, parts["zeros"])
                zeros = parts["zeros"]
                entries["weight_zero_point"] = words_of_codes(zeros.t().contiguous(), bits).t().contiguous()
        return entries


def float6_table(device: torch.device | str | None = None) -> Tensor:
    """Return the values (64,) float32 of the codes of E2M3, the sign in bit 5 (OCP Microscaling Formats 1.0, 5.3.2)."""
    eighths = torch.arange(8, dtype=torch.float32, device=device) / 8
    magnitudes = torch.cat([eighths, *((1 + eighths) * 2**exponent for exponent in range(3))])
    return torch.cat([magnitudes, -magnitudes])


def _table(layout: Lookup, device: torch.device) -> Tensor:
    return float4_table(device) if layout.bits == 4 else float6_table(device)


def _is_packed(layout: Affine) -> bool:
    return not layout.signed and not isinstance(layout, PlainAffine)


def _offset(layout: Affine) -> int:
    return 0 if layout.signed else 2 ** (layout.bits - 1)


def _read_scale(layout: Affine | Float8, scale: Tensor) -> Tensor:
    if scale.numel() != layout.scale_shape[0] * layout.scale_shape[1]:
        raise LayoutError(f"entry 'weight_scale' has shape {tuple(scale.shape)}, expected {layout.scale_shape}")
    scale = scale.reshape(layout.scale_shape).contiguous()
    return scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale


def _read_zeros(layout: Affine | Float8, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part ``zeros`` of an entry that holds them as they are; symmetric weights may have zeros of 0."""
    if "weight_zero_point" not in entries:
        return {}
    zeros = entries["weight_zero_point"]
    if not isinstance(layout, Affine) or layout.zero == "constant":
        if bool((zeros.float() != 0).any()):
            raise LayoutError("entry 'weight_zero_point' is not 0, and the config says that weights are symmetric")
        return {}
    if zeros.numel() != layout.scale_shape[0] * layout.scale_shape[1]:
        raise LayoutError(f"entry 'weight_zero_point' has shape {tuple(zeros.shape)}, expected {layout.scale_shape}")
    zeros = zeros.reshape(layout.scale_shape)
    if layout.signed:
        return {"zeros": zeros.contiguous()}
    return {"zeros": (zeros.to(torch.int16) + _offset(layout)).to(torch.uint8)}


def _written_zeros(layout: Affine | Float8, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(layout, Affine) or layout.zero == "constant":
        return {}
    zeros = (parts["zeros"].to(torch.int16) - _offset(layout)).to(torch.int8)
    return {"weight_zero_point": zeros.reshape(1) if has_one_scale(layout) else zeros.contiguous()}


def _check_codes(layout: Affine, codes: Tensor) -> None:
    low, high = -_offset(layout), _offset(layout) - 1
    if codes.device.type != "meta" and bool(((codes < low) | (codes > high)).any()):
        raise LayoutError(
            f"entry 'weight' holds {int(codes.min())} to {int(codes.max())}, codes of {layout.bits} bits {low}-{high}"
        )


def _with_words(
    name: str, entries: Mapping[str, Tensor], rows: tuple[int], count: int, bits: int, along: int = 1
) -> Tensor:
    """Return the entry as rows of words; raises :class:`LayoutError` unless ``count`` codes fit them exactly."""
    found = entries[name].t() if along == 0 else entries[name]
    if found.ndim != 2 or found.shape[0] != rows[0] or found.shape[1] not in (
        word_count(count, bits), old_word_count(count, bits)
    ):  # fmt: skip
        raise LayoutError(
            f"entry {name!r} has shape {tuple(entries[name].shape)}: {rows[0]} times {count} codes of {bits} bits take "
            f"{word_count(count, bits)} words each"
        )
    return found
