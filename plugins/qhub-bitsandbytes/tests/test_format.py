"""Checkpoint entries: bit-exact both ways, and nothing contradictory is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qhub_bitsandbytes import qhub_format
from qhub_bitsandbytes.blockwise import quantize_blockwise
from qhub_bitsandbytes.blockwise_format import BlockwiseFormat
from qhub_bitsandbytes.entries import MARKERS, STATE_NAMES
from qhub_bitsandbytes.int8_format import Int8Format
from qhub_bitsandbytes.layout import blockwise, int8, nested_scales
from qhub_bitsandbytes.state import read_state
from qhub_bitsandbytes.tables import dynamic_map, value_table
from transformers import BitsAndBytesConfig

from qhub.errors import LayoutError
from qhub.formats import Format
from qhub.layouts import Affine, Grid, Lookup, Nested


def same_bytes(first, second):
    """Return whether two tensors agree in dtype, shape and every bit."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*flat)


def decode_by_hand(entries, shape):
    """Decode 4-bit entries in float64, one weight after the other: the format as its documentation has it."""
    stored = entries["weight"].contiguous().reshape(-1).view(torch.uint8).tolist()
    (name,) = STATE_NAMES.values() & entries.keys()
    state = read_state(name, entries[name])
    table = entries["weight.quant_map"].double().tolist()
    scales = entries["weight.absmax"].tolist()
    if state.nested_blocksize is not None:
        levels = entries["weight.nested_quant_map"].double().tolist()
        second = entries["weight.nested_absmax"].double().tolist()
        scales = [
            levels[int(code)] * second[i // state.nested_blocksize] + state.nested_offset
            for i, code in enumerate(scales)
        ]
    weights = []
    for i in range(shape[0] * shape[1]):
        byte = stored[i // 2]
        weights.append(table[byte >> 4 if i % 2 == 0 else byte & 15] * scales[i // state.blocksize])
    return torch.tensor(weights, dtype=torch.float64).reshape(shape)


def test_entries_survive_a_round_trip(known):
    fmt = qhub_format(known.config)
    layout, parts = fmt.unpack(known.layout, known.entries)
    assert layout == known.layout
    layout.validate(parts)
    layout.check_values(parts)
    again = fmt.pack(layout, parts, known.dtype)
    assert sorted(again) == sorted(known.entries)
    assert all(same_bytes(again[name], entry) for name, entry in known.entries.items())


def test_the_header_check_accepts_what_upstream_writes(known):
    expected = qhub_format(known.config).entries(known.layout)
    assert set(known.entries) <= set(expected)
    assert all(name in known.entries for name, entry in expected.items() if entry.required)
    for name, tensor in known.entries.items():
        assert expected[name].shape in (None, tuple(tensor.shape))
        assert tensor.dtype in expected[name].dtypes


def test_decoding_agrees_with_the_documented_formula(known):
    layout, parts = qhub_format(known.config).unpack(known.layout, known.entries)
    found = layout.decode(parts).double()
    if isinstance(layout, Affine):
        expected = known.entries["weight"].double() * known.entries["SCB"].double().unsqueeze(1) / 127
    else:
        expected = decode_by_hand(known.entries, known.shape)
    # Four float32 roundings at most (nested: product, sum; product with the table), each up to the largest weight.
    assert float((found - expected).abs().max()) <= 4 * 2.0**-24 * float(expected.abs().max())


def test_entries_are_not_modified(nested_case):
    before = {name: entry.clone() for name, entry in nested_case.entries.items()}
    fmt = qhub_format(nested_case.config)
    layout, parts = fmt.unpack(nested_case.layout, nested_case.entries)
    kept = {name: part.clone() for name, part in parts.items()}
    fmt.pack(layout, parts, torch.float32)
    assert all(torch.equal(nested_case.entries[name], entry) for name, entry in before.items())
    assert all(torch.equal(parts[name], part) for name, part in kept.items())


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 150),
    group=st.sampled_from([32, 64, 128, 4096]),
    nested=st.sampled_from([None, 64, 256]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_any_codes_survive_a_round_trip(n, k, group, nested, quant_type, dtype, data):
    layout = blockwise(n, k, nested_scales(nested) if nested else None, group)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, layout.scale_shape, generator=generator, dtype=torch.uint8)
    parts = {"table": value_table(quant_type), "scales": scales if nested else scales.float()}
    packed = torch.nn.functional.pad(codes, (0, k % 2))
    parts["qweight"] = packed[:, ::2] | (packed[:, 1::2] << 4)
    if nested:
        count = layout.part_specs()["scales_super"].shape[0]
        parts["scales_super"] = torch.rand(count, generator=generator)
        parts["scales_table"] = dynamic_map()
        parts["scales_offset"] = torch.randn((), generator=generator)
    fmt = BlockwiseFormat()
    entries = fmt.pack(layout, parts, dtype)
    assert entries["weight"].shape == (-(-n * k // 2), 1)
    assert torch.equal(decode_by_hand(entries, (n, k)).float(), layout.decode(parts)) or torch.allclose(
        decode_by_hand(entries, (n, k)).float(), layout.decode(parts), rtol=1e-5, atol=1e-4
    )
    # A plan that knows nothing of block sizes and nesting is refined by the file.
    found, again = fmt.unpack(blockwise(n, k, None), entries)
    assert found == layout
    assert all(same_bytes(again[name], part) for name, part in parts.items())
    assert read_state(STATE_NAMES[quant_type], entries[STATE_NAMES[quant_type]]).dtype == str(dtype).split(".")[1]


@given(n=st.integers(1, 9), k=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_any_int8_codes_survive_a_round_trip(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    layout, fmt = int8(n, k, 6.0), Int8Format()
    parts = {
        "qweight": torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8),
        "scales": torch.rand(n, 1, generator=generator),
    }
    found, again = fmt.unpack(layout, fmt.pack(layout, parts, torch.float16))
    assert found == layout and all(same_bytes(again[name], part) for name, part in parts.items())


def test_the_file_decides_about_block_size_and_nesting(plain_case, nested_case):
    # A plan made from a config that says "nested" meets a file that is not, and the other way round.
    for case, other in ((plain_case, nested_scales()), (nested_case, None)):
        planned = blockwise(*case.shape, other)
        layout, parts = BlockwiseFormat().unpack(planned, case.entries)
        assert (layout.scales_nested is None) == (other is not None)
        layout.validate(parts)


def test_both_formats_tell_the_two_kinds_apart(nested_case, int8_case):
    for fmt in (Int8Format(), BlockwiseFormat()):
        assert isinstance(fmt, Format)
        for case in (nested_case, int8_case):
            assert fmt.markers & set(case.entries)
            assert set(case.entries) <= fmt.names
    assert "weight" not in MARKERS
    with pytest.raises(LayoutError, match=r"load_in_8bit.*weight\.absmax"):
        Int8Format().unpack(int8(*nested_case.shape, 6.0), nested_case.entries)
    with pytest.raises(LayoutError, match=r"load_in_4bit.*SCB"):
        BlockwiseFormat().unpack(blockwise(*int8_case.shape, None), int8_case.entries)


# -- damaged 4-bit files ----------------------------------------------------------------------------------------------

NAN = float("nan")


def state_entry(text):
    """Return a state entry that holds ``text``."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda t: t[:-1]),
        ("weight", lambda t: t.reshape(1, -1)),
        ("weight", lambda t: t.to(torch.int16)),
        ("weight.absmax", lambda t: t[:-1]),
        ("weight.absmax", lambda t: t.float()),
        ("weight.absmax", lambda t: t.unsqueeze(1)),
        ("weight.absmax", None),
        ("weight.quant_map", lambda t: t[:8]),
        ("weight.quant_map", lambda t: t.half()),
        ("weight.quant_map", lambda t: t.flip(0)),
        ("weight.quant_map", lambda t: t * NAN),
        ("weight.quant_map", lambda t: value_table("fp4")),
        ("weight.quant_map", None),
        ("weight.nested_absmax", lambda t: t[:1]),
        ("weight.nested_absmax", lambda t: t / 0),
        ("weight.nested_absmax", None),
        ("weight.nested_quant_map", lambda t: t[:16]),
        ("weight.nested_quant_map", lambda t: t * NAN),
        ("weight.nested_quant_map", None),
        (STATE_NAMES["nf4"], None),
    ],
)
def test_a_damaged_nested_file_is_refused_by_entry(nested_case, name, change):
    if change is None:
        del nested_case.entries[name]
    else:
        nested_case.entries[name] = change(nested_case.entries[name])
    with pytest.raises(LayoutError, match=name.replace(".", r"\.")):
        BlockwiseFormat().unpack(nested_case.layout, nested_case.entries)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight.absmax", torch.full((6,), NAN)),
        ("weight.absmax", torch.zeros(6, dtype=torch.uint8)),
        ("weight.nested_absmax", torch.ones(1)),
        ("weight.nested_quant_map", torch.zeros(256)),
        ("weight.surplus", torch.ones(1)),
        (STATE_NAMES["nf4"], state_entry("{}")),
    ],
)
def test_a_damaged_plain_file_is_refused_by_entry(plain_case, name, value):
    plain_case.entries[name] = value
    with pytest.raises(LayoutError, match=name.replace(".", r"\.")):
        BlockwiseFormat().unpack(plain_case.layout, plain_case.entries)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"nf4"', '"fp4"'),
        ("[128, 256]", "[256, 128]"),
        ("[128, 256]", "[32768]"),
        ('"blocksize": 64', '"blocksize": 128'),
        ('"nested_blocksize": 256', '"nested_blocksize": 64'),
    ],
)
def test_a_state_that_contradicts_the_other_entries_is_refused(nested_case, old, new):
    text = bytes(nested_case.entries[STATE_NAMES["nf4"]].tolist()).decode()
    assert old in text
    nested_case.entries[STATE_NAMES["nf4"]] = state_entry(text.replace(old, new))
    with pytest.raises(LayoutError, match=r"entry 'weight\."):
        BlockwiseFormat().unpack(nested_case.layout, nested_case.entries)


def test_a_state_under_the_other_types_name_is_refused(nested_case):
    nested_case.entries[STATE_NAMES["fp4"]] = nested_case.entries.pop(STATE_NAMES["nf4"])
    with pytest.raises(LayoutError, match="contradicts"):
        BlockwiseFormat().unpack(nested_case.layout, nested_case.entries)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_storage_dtype_that_the_config_does_not_name_is_refused(nested_case, storage):
    nested_case.entries["weight"] = nested_case.entries["weight"].reshape(-1).view(storage).unsqueeze(1)
    BlockwiseFormat(storage).unpack(nested_case.layout, nested_case.entries)
    with pytest.raises(LayoutError, match="entry 'weight' has dtype"):
        BlockwiseFormat().unpack(nested_case.layout, nested_case.entries)


def test_entries_share_no_memory_with_the_parts_of_other_experts(nested_case):
    # Fused experts hold one table; safetensors refuses a tensor under two names.
    fmt = BlockwiseFormat()
    layout, parts = fmt.unpack(nested_case.layout, nested_case.entries)
    first, second = (fmt.pack(layout, parts, torch.float32) for _ in range(2))
    for name in ("weight.quant_map", "weight.nested_quant_map"):
        assert first[name].data_ptr() != second[name].data_ptr()


# -- damaged int8 files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda t: t[:-1]),
        ("weight", lambda t: t.float()),
        ("weight", None),
        ("SCB", lambda t: t[:-1]),
        ("SCB", lambda t: t * NAN),
        ("SCB", lambda t: t.half()),
        ("SCB", None),
        ("weight_format", lambda t: t + 2),
        ("weight_format", lambda t: t.reshape(1)),
        ("weight_format", lambda t: t.float()),
    ],
)
def test_a_damaged_int8_file_is_refused_by_entry(int8_case, name, change):
    if change is None:
        del int8_case.entries[name]
    else:
        int8_case.entries[name] = change(int8_case.entries[name])
    with pytest.raises(LayoutError, match=name):
        Int8Format().unpack(int8_case.layout, int8_case.entries)


def test_an_int8_file_without_weight_format_is_row_major(int8_case):
    del int8_case.entries["weight_format"]
    layout, parts = Int8Format().unpack(int8_case.layout, int8_case.entries)
    assert torch.equal(parts["qweight"], int8_case.entries["weight"])
    assert layout == int8_case.layout


# -- what cannot be written ------------------------------------------------------------------------------------------


def test_layouts_that_upstream_cannot_store_are_refused():
    parts = quantize_blockwise(torch.ones(4, 64), blockwise(4, 64, nested_scales()), "nf4")
    plain = {name: parts[name] for name in ("qweight", "table")} | {"scales": torch.ones(4, 1)}
    fmt = BlockwiseFormat()
    good = blockwise(4, 64, None)
    assert fmt.pack(good, plain, torch.float32)
    with pytest.raises(LayoutError, match="weights, not float64"):
        fmt.pack(good, plain, torch.float64)
    with pytest.raises(LayoutError, match="stores the tables"):
        fmt.pack(good, {**plain, "table": torch.arange(16.0)}, torch.float32)
    with pytest.raises(LayoutError, match="blocks are runs of"):
        one = Lookup(out_features=4, in_features=64, bits=4, grid=Grid.along_k(16))
        fmt.pack(one, {**plain, "scales": torch.ones(4, 4)}, torch.float32)
    with pytest.raises(LayoutError, match="nests scales"):
        nested = Nested(dtype="uint8", group=256)
        one = Lookup(out_features=4, in_features=64, bits=4, grid=Grid.along_k(64), scales_nested=nested)
        few = {name: part for name, part in parts.items() if name not in ("scales_table", "scales_offset")}
        fmt.pack(one, few, torch.float32)
    with pytest.raises(LayoutError, match="codes into a table"):
        rows = {"qweight": torch.zeros(4, 64, dtype=torch.int8), "scales": torch.ones(4, 1)}
        fmt.pack(int8(4, 64, 0.0), rows, torch.float32)
    with pytest.raises(LayoutError, match="signed codes"):
        Int8Format().pack(good, plain, torch.float32)
    with pytest.raises(LayoutError, match="missing"):
        fmt.pack(good, {"qweight": plain["qweight"]}, torch.float32)


def test_the_config_picks_the_format():
    assert isinstance(qhub_format(BitsAndBytesConfig(load_in_8bit=True)), Int8Format)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    fmt = qhub_format(config)
    assert isinstance(fmt, BlockwiseFormat)
    assert fmt.entries(blockwise(4, 64, None))["weight"].dtypes == (torch.bfloat16,)
