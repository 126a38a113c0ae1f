"""The entries of every format against what compressed-tensors wrote: read to its weights, written to its bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qhub_compressed_tensors.config import spec
from qhub_compressed_tensors.format import CompressedTensorsFormat, float6_table
from qhub_compressed_tensors.plan import plan
from qhub_compressed_tensors.words import codes_of_words, old_word_count, word_count, words_of_codes
from torch import Tensor

from qhub.errors import LayoutError
from qhub.plan import WeightInfo


def _layout(weights: dict[str, Any], n: int, k: int, fmt: str = "pack-quantized") -> Any:
    values = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights, "format": fmt}}, "format": fmt}
    config = spec().parse({**values, "quantization_status": "compressed"})
    return plan(config, [WeightInfo("a.weight", n, k, torch.float32)])["a.weight"].layout  # type: ignore[union-attr]


def _same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, entry in wanted.items():
        assert found[name].dtype == entry.dtype, name
        assert found[name].shape == entry.shape, name
        if entry.numel():
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), entry.reshape(-1).view(torch.uint8)), name


def test_weights_are_the_librarys_bit_for_bit(known: Any) -> None:
    layout, parts = known.format.unpack(known.layout, known.copy())
    layout.validate(parts)
    layout.check_values(parts)
    assert torch.equal(layout.dequantize(parts), known.dequantized)


def test_entries_are_written_back_byte_for_byte(known: Any) -> None:
    layout, parts = known.format.unpack(known.layout, known.copy())
    _same(known.format.pack(layout, parts, torch.float32), known.entries)


def test_older_packing_of_three_bits_is_read(older: dict[str, dict[str, Tensor]]) -> None:
    entries = older["3 bits"]
    wanted = entries.pop("dequant")
    layout = _layout({"num_bits": 3, "group_size": 32}, 64, 128)
    fmt = CompressedTensorsFormat()
    layout, parts = fmt.unpack(layout, entries)
    assert torch.equal(layout.dequantize(parts), wanted)
    # Written in today's packing, which takes 12 words a row instead of 13.
    assert fmt.pack(layout, parts, torch.float32)["weight_packed"].shape == (64, 12)


def test_features_in_an_order_of_their_own(older: dict[str, dict[str, Tensor]]) -> None:
    entries = older["act-order"]
    wanted = entries.pop("dequant")
    planned = _layout({"num_bits": 4, "group_size": 32, "actorder": "group"}, 64, 128)
    fmt = CompressedTensorsFormat()
    layout, parts = fmt.unpack(planned, dict(entries))
    assert layout.transforms
    assert torch.equal(layout.dequantize(parts), wanted)
    _same(fmt.pack(layout, parts, torch.float32), entries)
    # -1 everywhere stands for features in order.
    plain, _ = fmt.unpack(planned, {**entries, "weight_g_idx": torch.full((128,), -1, dtype=torch.int32)})
    assert not plain.transforms


def test_group_indices_of_unequal_groups_are_refused(older: dict[str, dict[str, Tensor]]) -> None:
    entries = older["act-order"]
    del entries["dequant"]
    entries["weight_g_idx"][0] = 9
    layout = _layout({"num_bits": 4, "group_size": 32, "actorder": "group"}, 64, 128)
    with pytest.raises(LayoutError, match="weight_g_idx"):
        CompressedTensorsFormat().unpack(layout, entries)


def test_weights_stored_dense_are_rounded_when_read(cases: dict[str, Any], dense: Tensor) -> None:
    """Of the same scales the same codes as the library's, whose compressed file has them."""
    fmt = CompressedTensorsFormat(dense=True)
    packed = cases["4 bits in 32"]
    layout = _layout({"num_bits": 4, "group_size": 32}, 64, 128, "dense")
    entries = {"weight": dense, "weight_scale": packed.entries["weight_scale"].float()}
    read, parts = fmt.unpack(layout, entries)
    assert torch.equal(read.dequantize(parts), packed.dequantized)
    again = fmt.pack(read, parts, torch.float32)
    assert torch.equal(fmt.unpack(read, again)[0].dequantize(parts), packed.dequantized)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), count=st.integers(1, 100), seed=st.integers(0, 999))
def test_words_hold_strings_of_bits(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = words_of_codes(codes, bits)
    assert words.shape == (rows, word_count(count, bits)) and words.dtype == torch.int32
    assert torch.equal(codes_of_words(words, bits, count), codes)
    for row in range(rows):
        number = sum(int(code) << (bits * place) for place, code in enumerate(codes[row].tolist()))
        stored = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words[row].tolist()))
        assert number == stored


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_older_words_leave_bits_empty(bits: int) -> None:
    codes = torch.randint(2**bits, (2, 128), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    per_word = 32 // bits
    words = torch.zeros(2, old_word_count(128, bits), dtype=torch.int64)
    for place in range(128):
        words[:, place // per_word] |= codes[:, place].long() << (bits * (place % per_word))
    stored = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    assert torch.equal(codes_of_words(stored, bits, 128), codes)


def test_floats_of_six_bits() -> None:
    """E2M3 by its definition: exponent bias 1, subnormals of 1/8."""
    table = float6_table().tolist()
    for code in range(64):
        sign, exponent, fraction = -1.0 if code >> 5 else 1.0, (code >> 3) & 3, (code & 7) / 8
        value = fraction if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - 1)
        assert table[code] == sign * value and math.copysign(1, table[code]) == sign


@pytest.mark.parametrize(
    ("scheme", "name", "value", "words"),
    [
        ("4 bits in 32", "weight_shape", torch.tensor([64, 64]), "weight_shape"),
        ("4 bits in 32", "weight_packed", torch.zeros(64, 15, dtype=torch.int32), "weight_packed"),
        ("3 bits in 32", "weight_packed", torch.zeros(64, 14, dtype=torch.int32), "weight_packed"),
        ("4 bits in 32, asymmetric", "weight_zero_point", torch.zeros(9, 4, dtype=torch.int32), "weight_zero_point"),
        ("4 bits in 32", "weight_scale", torch.ones(64, 5), "weight_scale"),
        ("FP8", "input_scale", torch.ones(2), "input_scale"),
        ("FP8", "weight_scale", torch.ones(2), "weight_scale"),
        ("FP8", "weight_zero_point", torch.ones(1, dtype=torch.int8), "weight_zero_point"),
        ("NVFP4", "weight_global_scale", torch.zeros(1), "weight_global_scale"),
        ("NVFP4", "weight_global_scale", torch.ones(2), "weight_global_scale"),
        ("W8A8", "weight_zero_point", torch.ones(64, 1, dtype=torch.int8), "weight_zero_point"),
        ("4 bits in bytes, int8 inputs", "weight", torch.full((64, 128), 9, dtype=torch.int8), "9"),
        ("int8, asymmetric weights and inputs", "weight_zero_point", torch.zeros(3, 1, dtype=torch.int8), "zero_point"),
        ("W8A8", "weight", torch.zeros(64, 128), "weight"),
    ],
)  # fmt: skip
def test_contradicting_entries_are_refused(
    scheme: str, name: str, value: Tensor, words: str, cases: dict[str, Any]
) -> None:
    case = cases[scheme]
    with pytest.raises(LayoutError, match=words):
        case.format.unpack(case.layout, {**case.copy(), name: value})


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4", "MXFP4", "4 bits in 32", "FP8_BLOCK"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_impossible_scales_are_refused(scheme: str, number: float, cases: dict[str, Any]) -> None:
    case = cases[scheme]
    entries = case.copy()
    names = [name for name in entries if "scale" in name]
    for name in names:
        bad = entries[name].clone()
        if bad.dtype == torch.uint8:
            bad.reshape(-1)[0] = 255  # E8M0's NaN
        elif bad.dtype == torch.float8_e4m3fn:
            bad.view(torch.uint8).reshape(-1)[0] = 0x7F  # E4M3's NaN
        else:
            bad.reshape(-1)[0] = number
        with pytest.raises(LayoutError):
            layout, parts = case.format.unpack(case.layout, {**entries, name: bad})
            layout.check_values(parts)


def test_a_code_outside_its_format_is_refused(cases: dict[str, Any]) -> None:
    case = cases["FP8"]
    entries = case.copy()
    entries["weight"].view(torch.uint8)[3, 4] = 0x7F
    layout, parts = case.format.unpack(case.layout, entries)
    with pytest.raises(LayoutError, match="qweight"):
        layout.check_values(parts)


def test_zeros_that_no_file_holds_are_refused() -> None:
    """GPTQ's first format has zeros of 16 for 4 bits; packing them would spoil their neighbours."""
    layout = _layout({"num_bits": 4, "group_size": 32, "symmetric": False}, 8, 32)
    parts = {"qweight": torch.zeros(8, 16, dtype=torch.uint8), "scales": torch.ones(8, 1),
             "zeros": torch.full((8, 1), 16, dtype=torch.uint8)}  # fmt: skip
    with pytest.raises(LayoutError, match="zeros"):
        CompressedTensorsFormat().pack(layout, parts, torch.float32)


def test_one_block_one_row_and_one_scale_are_told_apart() -> None:
    """Files hold the scale of a tensor as a vector, that of a matrix of one block as a matrix."""
    fmt, e4m3 = CompressedTensorsFormat(), torch.float8_e4m3fn
    for shape in ((128, 128), (64, 128), (1, 128), (128, 64)):
        for weights, fp8 in (
            ({"strategy": "tensor"}, (1,)),
            ({"strategy": "channel"}, (shape[0], 1)),
            ({"strategy": "block", "block_structure": [128, 128]}, (1, 1)),
        ):
            layout = _layout({"num_bits": 8, "type": "float", **weights}, *shape, "float-quantized")
            parts = {"qweight": torch.ones(shape).to(e4m3), "scales": torch.ones(layout.scale_shape)}
            assert fmt.pack(layout, parts, torch.float32)["weight_scale"].shape == fp8
            halves = layout.with_rows(shape[0])
            assert fmt.pack(halves, parts, torch.float32)["weight_scale"].shape == fp8
