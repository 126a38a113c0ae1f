"""Weights in tiles are the same weights: bit for bit back, whatever is done to them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhub.errors import LayoutError
from qhub.kernels.arranging import arrange_tensor
from qhub.layouts import Activation, Affine, Float8, Grid, Lookup
from qhub.layouts.packing import pack
from qhub.layouts.tiled import ROWS, SLICE, Tiled
from qhub.tensor import QuantizedTensor


def affine(n, k, bits, group, zero="constant"):
    layout = Affine(out_features=n, in_features=k, bits=bits, grid=Grid.along_k(group), zero=zero)
    parts = {
        "qweight": layout.pack_codes(torch.randint(0, 2**bits, (n, k))),
        "scales": torch.rand(layout.scale_shape) + 0.1,
    }
    if zero != "constant":
        parts["zeros"] = torch.randint(0, 2**bits, layout.scale_shape, dtype=torch.uint8)
    return layout, parts


@settings(max_examples=60)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    bits=st.integers(1, 8),
    group=st.sampled_from([32, 64, 96, 512]),
    seed=st.integers(0, 99),
)
def test_comes_back_bit_for_bit(n, k, bits, group, seed):
    torch.manual_seed(seed)
    layout, parts = affine(n, k, bits, group, "value")
    tiled, own = Tiled.arrange(layout, parts)
    tiled.validate(own)
    plain, back = tiled.plain(own)
    assert plain == layout and set(back) == set(parts)
    assert all(torch.equal(back[name], part) and back[name].dtype == part.dtype for name, part in parts.items())


def test_places_codes_as_documented():
    layout, parts = affine(70, 300, 4, 64)
    _, own = Tiled.arrange(layout, parts)
    codes = layout.codes(parts)
    for row, column in ((0, 0), (1, 33), (69, 299), (64, 128), (5, 255)):
        block, place, word = column // 128, column % 128 // SLICE, column % SLICE
        held = int(own["qweight"][row // ROWS, block, row % ROWS, word]) & 0xFFFF
        assert held >> (4 * place) & 15 == int(codes[row, column])


@pytest.mark.parametrize("rows", [(0, 64), (64, 128), (64, 150), (3, 77)])
def test_rows_are_those_of_the_plain_weight(rows):
    layout, parts = affine(150, 256, 4, 64, "value")
    tiled, own = Tiled.arrange(layout, parts)
    cut, piece = tiled.select_rows(own, *rows)
    assert torch.equal(cut.dequantize(piece), layout.dequantize(parts)[rows[0] : rows[1]])


def test_whole_tiles_are_views_and_join_as_tiles():
    layout, parts = affine(192, 256, 4, 64)
    tiled, own = Tiled.arrange(layout, parts)
    first, one = tiled.select_rows(own, 0, 64)
    second, two = tiled.select_rows(own, 64, 192)
    assert one["qweight"].untyped_storage().data_ptr() == own["qweight"].untyped_storage().data_ptr()
    joined, both = tiled.concat_rows([one, two], [first, second])
    assert joined == tiled and all(torch.equal(both[name], own[name]) for name in own)


def test_writing_gives_the_codes_that_the_plain_weight_takes():
    layout, parts = affine(80, 256, 3, 64)
    plain = QuantizedTensor.build(layout, {name: part.clone() for name, part in parts.items()}, torch.float32)
    arranged = QuantizedTensor.build(layout, {name: part.clone() for name, part in parts.items()}, torch.float32)
    assert arrange_tensor(arranged, forced=True) and not arrange_tensor(arranged, forced=True)
    update = torch.randn(80, 256) * 0.1
    for weight in (plain, arranged):
        weight.write_(weight.dequantize() + update)
    assert torch.equal(plain.dequantize(), arranged.dequantize())
    back = arranged.in_plain_order()
    assert back.quant_layout == layout and torch.equal(back.parts["qweight"], plain.parts["qweight"])
    x = torch.randn(3, 256)
    assert torch.allclose(torch.nn.functional.linear(x, arranged), x @ plain.dequantize().T, atol=1e-4)


def test_experts_are_arranged_one_by_one():
    layout, parts = affine(70, 128, 4, 64)
    three = {name: torch.stack([part, part, part]) for name, part in parts.items()}
    weight = QuantizedTensor.build(layout, three, torch.float32)
    assert arrange_tensor(weight, forced=True) and weight.shape == (3, 70, 128)
    assert torch.equal(weight[1].dequantize(), layout.dequantize(parts))


def looked_up(n, k, short=True):
    layout = Lookup(out_features=n, in_features=k, grid=Grid.along_k(64))
    scales = torch.rand(layout.scale_shape) + 0.1
    return layout, {
        "qweight": pack(torch.randint(0, 16, (n, k)).to(torch.uint8), 4),
        "scales": scales.bfloat16().float() if short else scales,
        "table": torch.linspace(-1, 1, 16),
    }


@pytest.mark.parametrize("short", [True, False])
def test_scales_take_half_the_memory_where_nothing_is_lost(short):
    layout, parts = looked_up(130, 192, short)
    tiled, own = Tiled.arrange(layout, parts)
    tiled.validate(own)
    assert own["scales"].dtype == (torch.bfloat16 if short else torch.float32)
    back = tiled.plain(own)[1]
    assert all(torch.equal(back[name], part) and back[name].dtype == part.dtype for name, part in parts.items())
    assert torch.equal(tiled.dequantize(own), layout.dequantize(parts))
    first, second = tiled.select_rows(own, 0, 64), tiled.select_rows(own, 64, 130)
    joined, both = tiled.concat_rows([first[1], second[1]], [first[0], second[0]])
    assert joined == tiled and torch.equal(both["scales"], own["scales"])


def test_weights_with_and_without_short_scales_are_not_joined():
    one, two = (Tiled.arrange(*looked_up(64, 128, short)) for short in (True, False))
    assert one[0].concat_rows([one[1], two[1]], [one[0], two[0]]) is None


def test_what_is_fitted_anew_has_codes_for_its_short_scales():
    layout, parts = looked_up(70, 128)
    tiled, own = Tiled.arrange(layout, parts)
    wanted = torch.randn(70, 128)
    plain = tiled.plain(tiled.encode(wanted, own, "refit"))[1]
    fitted = layout.fit(wanted, parts)["scales"]
    assert torch.equal(plain["scales"], fitted.bfloat16().float()) and not torch.equal(plain["scales"], fitted)
    assert torch.equal(plain["qweight"], layout.nearest(wanted, plain)["qweight"])


def test_blocks_of_rows_share_their_scales_again():
    layout = Float8(out_features=200, in_features=256, grid=Grid("block", 128, 128))
    parts = {"qweight": torch.randn(200, 256).to(torch.float8_e4m3fn), "scales": torch.rand(2, 2) + 0.1}
    tiled, own = Tiled.arrange(layout, parts)
    assert torch.equal(tiled.dequantize(own), layout.dequantize(parts))
    assert torch.equal(tiled.plain(own)[1]["scales"], parts["scales"])


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Affine(out_features=8, in_features=64, bits=4, grid=Grid("flat", 1, 48)), "flat runs"),
        (Affine(out_features=8, in_features=64, bits=4, grid=Grid.along_k(16)), "slices of 32"),
        (Lookup(out_features=8, in_features=64, grid=Grid.along_k(32), activation=Activation(kind="int8")), "rounded"),
    ],
)
def test_says_why_not(layout, reason):
    assert reason in Tiled.refusal(layout)
    with pytest.raises(LayoutError, match=reason):
        Tiled.arrange(layout, {})
