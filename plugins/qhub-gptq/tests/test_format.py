"""GPTQ's checkpoint entries: as gptqmodel reads them, byte for byte both ways, refused when they cannot be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qhub_gptq.dynamic import Settings
from qhub_gptq.format import GptqFormat
from qhub_gptq.order import group_index, permutation
from qhub_gptq.plan import ACT_ORDER, layout_of
from torch import Tensor

from qhub.errors import LayoutError


def test_reading_gives_the_weights_that_gptqmodel_gives(known: Any) -> None:
    """A product of 11 and at most 9 bits is exact in float32; rounded once to float16 it is gptqmodel's."""
    layout, parts = known.format.unpack(known.layout, known.entries)
    layout.validate(parts)
    layout.check_values(parts)
    weights = layout.dequantize(parts)
    assert torch.equal(weights.half(), known.dequantized)
    # Half a unit in the last place of float16; of its smallest numbers 2^-25.
    bound = (weights.abs() * 2.0**-11).clamp_min(2.0**-25)
    assert bool(((weights - known.dequantized.float()).abs() <= bound).all())


def test_writing_gives_what_was_read(known: Any) -> None:
    layout, parts = known.format.unpack(known.layout, known.entries)
    written = known.format.pack(layout, parts, torch.float16)
    assert set(written) == set(known.entries) == set(known.format.names)
    for name, entry in known.entries.items():
        assert written[name].dtype == entry.dtype
        assert torch.equal(written[name], entry), name


def test_every_entry_is_declared(known: Any) -> None:
    declared = known.format.entries(known.layout)
    assert set(declared) == set(known.entries)
    for name, entry in known.entries.items():
        assert declared[name].shape == tuple(entry.shape)
        assert entry.dtype in declared[name].dtypes
        assert declared[name].required or name == "g_idx"


@st.composite
def layers(draw: st.DrawFn) -> tuple[Settings, Tensor, Tensor, Tensor, Tensor, bool]:
    """Draw settings, codes (N, K), zeros (G, N), scales (G, N), g_idx (K,) and whether the format is v1."""
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    group = draw(st.sampled_from([-1, 1, 8, 32, 128]))
    settings = Settings(bits, group, draw(st.booleans()), draw(st.booleans()))
    size = k if group == -1 else min(group, k)
    groups = -(-k // size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    codes = torch.randint(0, 2**bits, (n, k), generator=generator)
    zeros = torch.randint(0, 2**bits, (groups, n), generator=generator)
    if settings.sym:
        zeros.fill_(2 ** (bits - 1))
    scales = torch.rand(groups, n, generator=generator).half()
    g_idx = torch.arange(k) // size
    if settings.desc_act:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    return settings, codes, zeros, scales, g_idx.int(), draw(st.booleans())


def _words(codes: Tensor, bits: int) -> Tensor:
    """Return the words of each row of ``codes`` by plain Python integers."""
    rows = []
    for row in codes.tolist():
        whole = sum(code << (bits * place) for place, code in enumerate(row))
        words = [(whole >> (32 * index)) & 0xFFFFFFFF for index in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@given(layers())
def test_any_layer_is_read_by_the_formula_and_written_back(drawn: Any) -> None:
    """W[n, k] = scales[g_idx[k], n] * (q[n, k] - zeros[g_idx[k], n]), in float64; ragged rows and groups included."""
    settings, codes, zeros, scales, g_idx, v1 = drawn
    (n, k), bits = codes.shape, settings.bits
    stored = _words(zeros, bits)
    if v1 and bits == 3:
        stored = _words((zeros - 1) % 8, 3)
    elif v1:
        stored = ((stored.long() - {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]) & 0xFFFFFFFF).int()
    entries = {"qweight": _words(codes, bits).t().contiguous(), "qzeros": stored, "scales": scales, "g_idx": g_idx}
    fmt = GptqFormat(v1)
    planned = layout_of(settings, n, k)
    assert {name: entry.shape for name, entry in fmt.entries(planned).items()} == {
        name: tuple(entry.shape) for name, entry in entries.items()
    }
    layout, parts = fmt.unpack(planned, entries)
    layout.validate(parts)
    layout.check_values(parts)
    index = g_idx.long()
    expected = scales.double()[index].t() * (codes - zeros[index].t()).double()
    assert torch.equal(layout.dequantize(parts).double(), expected)
    written = fmt.pack(layout, parts, torch.float16)
    assert [name for name, entry in entries.items() if not torch.equal(written[name], entry)] == []
    again, same = fmt.unpack(layout, written)
    assert again == layout
    assert [name for name, part in parts.items() if not torch.equal(same[name], part)] == []


@given(st.integers(1, 80), st.integers(1, 90), st.integers(0, 9999))
def test_order_and_group_index_follow_from_each_other(count: int, group: int, seed: int) -> None:
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    g_idx = (torch.arange(count) // group)[shuffled].int()
    perm = permutation(g_idx, group)
    assert torch.equal(group_index(perm, count, group, g_idx.device), g_idx)
    if perm is not None:
        assert torch.equal(g_idx[perm.long()], torch.arange(count).int() // group)


def test_features_in_order_need_no_index(known: Any) -> None:
    """Older writers leave g_idx out; it is refused only where the config says that the order matters."""
    entries = known.copy()
    g_idx = entries.pop("g_idx")
    in_order = torch.equal(g_idx, torch.arange(len(g_idx), dtype=torch.int32) // known.layout.grid.cols)
    if known.layout.transforms:
        with pytest.raises(LayoutError, match="'g_idx' is missing"):
            known.format.unpack(known.layout, entries)
    else:
        assert in_order
        layout, parts = known.format.unpack(known.layout, entries)
        assert torch.equal(layout.dequantize(parts).half(), known.dequantized)


def test_the_file_decides_about_order_and_zeros(act_order: Any, borrowing: Any) -> None:
    """A config that says desc_act=false or sym=true beside other tensors: the tensors are read, as gptqmodel does."""
    plain = dataclasses.replace(act_order.layout, transforms=())
    layout, parts = act_order.format.unpack(plain, act_order.entries)
    assert layout.transforms == ACT_ORDER
    assert torch.equal(layout.dequantize(parts).half(), act_order.dequantized)
    constant = dataclasses.replace(borrowing.layout, zero="constant", zero_point=8.0)
    layout, parts = borrowing.format.unpack(constant, borrowing.entries)
    assert layout == borrowing.layout
    assert torch.equal(layout.dequantize(parts).half(), borrowing.dequantized)
    ordered = dataclasses.replace(borrowing.layout, transforms=ACT_ORDER)
    assert borrowing.format.unpack(ordered, borrowing.entries)[0] == borrowing.layout


def test_what_is_given_stays_as_it_is(act_order: Any) -> None:
    entries = act_order.copy()
    layout, parts = act_order.format.unpack(act_order.layout, entries)
    kept = {name: part.clone() for name, part in parts.items()}
    act_order.format.pack(layout, parts, torch.float16)
    assert all(torch.equal(entries[name], entry) for name, entry in act_order.entries.items())
    assert all(torch.equal(parts[name], part) for name, part in kept.items())


def _index(*changes: tuple[int, int]) -> Tensor:
    g_idx = torch.arange(256, dtype=torch.int32) // 32
    for place, group in changes:
        g_idx[place] = group
    return g_idx


HOSTILE: dict[str, tuple[str, Tensor | None, str]] = {
    "no codes": ("qweight", None, "'qweight' is missing"),
    "no zeros": ("qzeros", None, "'qzeros' is missing"),
    "no scales": ("scales", None, "'scales' is missing"),
    "no index": ("g_idx", None, "'g_idx' is missing"),
    "other bits": ("qweight", torch.zeros(64, 128, dtype=torch.int32), "'qweight' is int32 .64, 128., expected"),
    "transposed codes": ("qweight", torch.zeros(128, 32, dtype=torch.int32), "'qweight'"),
    "wide codes": ("qweight", torch.zeros(32, 128, dtype=torch.int64), "'qweight' is int64"),
    "other groups": ("qzeros", torch.zeros(2, 16, dtype=torch.int32), "'qzeros'"),
    "narrow zeros": ("qzeros", torch.zeros(8, 15, dtype=torch.int32), "'qzeros'"),
    "float zeros": ("qzeros", torch.zeros(8, 16), "'qzeros'"),
    "few scales": ("scales", torch.ones(8, 64, dtype=torch.float16), "'scales'"),
    "whole scales": ("scales", torch.ones(8, 128, dtype=torch.int32), "'scales'"),
    "group 8 of 8": ("g_idx", _index((3, 8)), "'g_idx' holds 8"),
    "huge group": ("g_idx", _index((3, 2**31 - 1)), "'g_idx' holds 2147483647"),
    "negative group": ("g_idx", _index((255, -1)), "'g_idx' holds -1"),
    "unequal groups": ("g_idx", _index((0, 5)), "group 0 31 of the 256 input features, group_size 32 gives it 32"),
    "short index": ("g_idx", torch.zeros(255, dtype=torch.int32), "'g_idx'"),
    "float index": ("g_idx", torch.zeros(256), "'g_idx'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_entries_that_cannot_be_are_refused(act_order: Any, name: str) -> None:
    entry, value, message = HOSTILE[name]
    entries = act_order.copy()
    if value is None:
        del entries[entry]
    else:
        entries[entry] = value
    with pytest.raises(LayoutError, match=message):
        act_order.format.unpack(act_order.layout, entries)


def test_an_infinite_scale_is_refused(act_order: Any) -> None:
    entries = act_order.copy()
    entries["scales"][3, 5] = float("inf")
    layout, parts = act_order.format.unpack(act_order.layout, entries)
    with pytest.raises(LayoutError, match="scales"):
        layout.check_values(parts)
