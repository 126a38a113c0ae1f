"""Entries and headers of files: torchao's own, bit for bit both ways, and damaged ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qhub_torchao import header
from qhub_torchao.config import spec
from qhub_torchao.format import TorchAoFormat
from qhub_torchao.names import ACT_PRE_SCALE, QDATA, SCALE, SCALE_AND_ZERO, ZERO
from qhub_torchao.reading import settings_for
from qhub_torchao.tiles import from_tiles, to_tiles
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Affine

PACKED = {
    "plain": "PLAIN",
    "words": "PLAIN_INT32",
    "tiles": "TILE_PACKED_TO_4D",
}


def _int4(packing: str) -> Any:
    data = {"group_size": 32, "int4_packing_format": PACKED[packing]}
    return spec().parse({"quant_type": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": data}})


def _parts(layout: Affine, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    size = layout.out_features, layout.in_features
    codes = torch.randint(0, 16, size, generator=generator, dtype=torch.uint8)
    scales = torch.rand(layout.scale_shape, generator=generator).add(0.5).bfloat16()
    if layout.zero == "value":
        zeros = torch.randint(0, 16, layout.scale_shape, generator=generator, dtype=torch.uint8)
    else:
        zeros = torch.randn(layout.scale_shape, generator=generator).bfloat16()
    return codes, {"qweight": layout.pack_codes(codes), "scales": scales, "zeros": zeros}


def test_reads_and_writes_torchaos_entries(golden: Any, same: Callable[[Tensor, Tensor], bool]) -> None:
    """What torchao flattened is what is written for what was read."""
    fmt = TorchAoFormat(golden.config)
    layout, parts = fmt.unpack(golden.layout, golden.entries)
    layout.validate(parts)
    again = fmt.pack(layout, parts, golden.dense.dtype)
    assert again.keys() == golden.entries.keys()
    for name, entry in golden.entries.items():
        assert same(again[name], entry), name


def test_header_is_torchaos(golden: Any) -> None:
    """Class, attributes and tensors, as torchao's encoder writes them."""
    layout = golden.layout
    assert header.describe(layout, settings_for(golden.config, layout), golden.dense.dtype) == golden.header


def test_entries_are_declared(golden: Any) -> None:
    """A file is checked against names, shapes and dtypes before it is read."""
    declared = TorchAoFormat(golden.config).entries(golden.layout)
    for name, entry in golden.entries.items():
        assert tuple(entry.shape) == declared[name].shape, name
        assert entry.dtype in declared[name].dtypes, name


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("size", [(8, 128), (12, 1088), (3, 64)])
def test_packed_codes_come_back(packing: str, size: tuple[int, int], same: Callable[[Tensor, Tensor], bool]) -> None:
    """Every code, scale and zero, also where tiles are filled up."""
    config = _int4(packing)
    layout = next(iter(_layouts(config, size)))
    codes, parts = _parts(layout)
    fmt = TorchAoFormat(config)
    entries = fmt.pack(layout, parts, torch.bfloat16)
    again, found = fmt.unpack(layout, entries)
    assert again == layout
    for name, part in parts.items():
        assert same(found[name], part), name
    if packing == "tiles":
        return
    # One code after the other, the first in the lowest bits.
    words = entries[QDATA].view(torch.uint8).reshape(size[0], -1)
    nibbles = torch.stack([words & 15, words >> 4], -1).reshape(size)
    # Two's complement: codes count from -8.
    assert torch.equal(nibbles if packing == "words" else (nibbles + 8) % 16, codes)


def _layouts(config: Any, size: tuple[int, int]) -> list[Any]:
    from qhub_torchao.reading import settings_by_name

    return [one.layout(*size) for one in settings_by_name(config).values() if one is not None]


def test_tiles_hold_the_codes_where_the_kernel_wants_them() -> None:
    """The order written down in int4mm.cu, code by code."""
    codes = torch.randint(0, 16, (16, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tiles = to_tiles(codes)
    assert tiles.shape == (2, 2, 32, 4)
    assert torch.equal(from_tiles(tiles), codes)
    for row, outer, lane, inner in [(0, 0, 0, 0), (1, 1, 31, 3), (0, 1, 13, 2), (1, 0, 6, 1)]:
        first = outer * 128 + inner * 32 + lane % 4 * 2
        columns = [first, first + 1, first + 8, first + 9, first + 16, first + 17, first + 24, first + 25]
        values = [int(codes[row * 8 + lane // 4, column]) for column in columns]
        word = sum(values[source] << (4 * place) for place, source in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
        assert int(tiles[row, outer, lane, inner]) & 0xFFFFFFFF == word


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_tiles_hold_every_code_once(rows: int, columns: int, seed: int) -> None:
    """to_tiles and from_tiles undo each other; codes of nothing but one 15 fill one nibble."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (8 * rows, 128 * columns), generator=generator, dtype=torch.uint8)
    assert torch.equal(from_tiles(to_tiles(codes)), codes)
    single = torch.zeros_like(codes)
    single[seed % codes.shape[0], seed % codes.shape[1]] = 15
    words = to_tiles(single).flatten().tolist()
    (word,) = [one & 0xFFFFFFFF for one in words if one]
    assert word in [15 << (4 * place) for place in range(8)]


def test_zeros_that_the_config_does_not_have(cases: dict[str, Any]) -> None:
    """A file whose symmetric weights have zeros all the same is read with them."""
    case = cases["intx4-noclip"]
    fmt, entries = TorchAoFormat(case.config), dict(case.entries)
    entries[ZERO] = torch.full_like(entries[ZERO], -3)
    layout, parts = fmt.unpack(case.layout, entries)
    assert isinstance(layout, Affine)
    assert layout.zero == "value"
    wanted = (case.entries[QDATA].float() + 3) * case.entries[SCALE].float().repeat_interleave(32, 1)
    assert torch.equal(layout.dequantize(parts), wanted.bfloat16().float())
    again = fmt.pack(layout, parts, torch.bfloat16)
    assert all(torch.equal(again[name], entry) for name, entry in entries.items())


def test_int8_without_zeros_is_read(cases: dict[str, Any]) -> None:
    """As releases before 0.15 wrote it."""
    case = cases["int8-row-bf16"]
    entries = {name: entry for name, entry in case.entries.items() if name != ZERO}
    layout, parts = TorchAoFormat(case.config).unpack(case.layout, entries)
    assert torch.equal(layout.dequantize(parts, torch.bfloat16), case.dequantized)


def test_factors_of_the_input(cases: dict[str, Any]) -> None:
    """act_pre_scale multiplies the layer's input."""
    case = cases["int8-row-bf16"]
    fmt = TorchAoFormat(case.config)
    factors = torch.rand(64).add(0.5).bfloat16()
    layout, parts = fmt.unpack(case.layout, {**case.entries, ACT_PRE_SCALE: factors})
    wanted = case.dequantized.float() * factors.float()
    # The stored weight is exact here, the product one rounding of float32.
    plain, held = fmt.unpack(case.layout, case.entries)
    assert torch.equal(layout.dequantize(parts), plain.dequantize(held) * factors.float())
    assert float((layout.dequantize(parts) - wanted).abs().max()) < 2**-8 * float(wanted.abs().max())
    entries = fmt.pack(layout, parts, torch.bfloat16)
    assert torch.equal(entries[ACT_PRE_SCALE], factors)
    described = header.describe(layout, settings_for(case.config, layout), torch.bfloat16)
    assert described["_tensor_data_names"] == ["zero_point", "act_pre_scale", "qdata", "scale"]
    with pytest.raises(LayoutError, match=ACT_PRE_SCALE):
        fmt.unpack(case.layout, {**case.entries, ACT_PRE_SCALE: factors[:5]})


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["int8-row-bf16", "intx3-asym-f16", "float8-row", "tiles-g32"])
def test_impossible_scales_are_refused(name: str, value: float, cases: dict[str, Any]) -> None:
    """Zero, infinite and NaN: the entry is named."""
    case = cases[name]
    key = SCALE_AND_ZERO if "tiles" in name else SCALE
    entry = case.entries[key].clone()
    entry.view(-1)[0] = value
    with pytest.raises(LayoutError, match=key):
        TorchAoFormat(case.config).unpack(case.layout, {**case.entries, key: entry})


def test_codes_beyond_their_bits_are_refused(cases: dict[str, Any]) -> None:
    """A 3-bit code of 4 would be read as another one."""
    case = cases["intx3-asym-f16"]
    codes = case.entries[QDATA].clone()
    codes[1, 1] = 4
    with pytest.raises(LayoutError, match=r"_weight_qdata.*int3"):
        TorchAoFormat(case.config).unpack(case.layout, {**case.entries, QDATA: codes})


def _damaged(said: dict[str, Any], **changes: Any) -> str:
    changed = copy.deepcopy(said)
    changed["_data"] |= changes
    return json.dumps(changed)


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("int8-row-bf16", {"block_size": [1, 32]}, "block_size"),
        ("int8-row-bf16", {"act_quant_kwargs": {"_type": "QuantizeTensorToInt8Kwargs", "_data": {}}}, "act_quant"),
        ("int8-dynamic-bf16", {"act_quant_kwargs": None}, "act_quant_kwargs"),
        ("intx4-dynamic", {"target_dtype": {"_type": "torch.dtype", "_data": "int3"}}, "target_dtype"),
        ("tiles-g32", {"shape": [24, 1024]}, "shape"),
    ],
)
def test_a_header_against_the_config(name: str, changes: dict[str, Any], found: str, cases: dict[str, Any]) -> None:
    """What the header says against the config is named; what it does not say is no contradiction."""
    case = cases[name]
    fmt, layouts = TorchAoFormat(case.config), {"m.weight": case.layout}
    assert fmt.check_metadata({"m.weight": json.dumps(case.header)}, layouts) == []
    assert fmt.check_metadata({}, layouts) == []
    (problem,) = fmt.check_metadata({"m.weight": _damaged(case.header, **changes)}, layouts)
    assert "m.weight" in problem
    assert found in problem
    (problem,) = fmt.check_metadata({"m.weight": json.dumps({"_type": "Float9Tensor"})}, layouts)
    assert "Float9Tensor" in problem
    (problem,) = fmt.check_metadata({"m.weight": "{no json"}, layouts)
    assert "m.weight" in problem


def test_older_headers_say_less(cases: dict[str, Any]) -> None:
    """An attribute that an older release did not have is not missed."""
    case = cases["int8-dynamic-bf16"]
    said = copy.deepcopy(case.header)
    del said["_data"]["reduce_range"]
    del said["_data"]["act_quant_kwargs"]["_data"]["reduce_range"]
    assert TorchAoFormat(case.config).check_metadata({"m.weight": json.dumps(said)}, {"m.weight": case.layout}) == []


def test_the_whole_header(cases: dict[str, Any]) -> None:
    """All names in one list, and an entry for each, dense parameters too."""
    case = cases["float8-row"]
    found = TorchAoFormat(case.config).metadata({"m.weight": (case.layout, torch.bfloat16)}, ["m.bias"])
    assert json.loads(found["tensor_names"]) == ["m.bias", "m.weight"]
    assert json.loads(found["m.bias"]) == {"_type": "Tensor"}
    assert json.loads(found["m.weight"]) == case.header
