"""Rows cut out of a matrix, and matrices put on top of each other: exact where offered, None where it cannot be."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from qhub.layouts import Affine, Float8, Grid, Layout

from .cases import CASES, batch, case

# Rows [start, stop) and whether they can be cut out; 16 to 24 in any format that is not listed.
CUTS: dict[str, list[tuple[int, int, bool]]] = {
    # 4 scales a row, 256 to a second-level scale: 64 rows hold whole ones, and within 64 rows there is only one.
    "nf4_nested": [(0, 64, True), (64, 96, True), (16, 40, True), (0, 80, True), (48, 80, False)],
    "fp4_nested": [(0, 64, True), (64, 128, True), (65, 127, True), (63, 65, False)],
    # 100 / 64 scales a row: every 16th row begins one; a row that lies within one scale can be cut too.
    "nf4_ragged": [(16, 32, True), (0, 5, True), (32, 33, True), (1, 5, False), (8, 16, False)],
    "hqq4_crossing_rows": [(16, 40, True), (88, 96, True), (0, 3, True), (4, 12, False)],
    # A group of axis 0 has members in every row; a rotation of the output mixes all rows.
    **{f"hqq{bits}_axis0": [(16, 24, False), (0, 48, False)] for bits in (1, 2, 3, 4, 8)},
    "quip_e8p12": [(16, 24, False)],
    "quip_e8p12_factor3": [(16, 24, False)],
    "aqlm_3x6_2d_blocks": [(16, 24, True), (15, 24, False), (16, 23, False)],
    "e4m3_blocks": [(128, 256, True), (0, 128, True), (0, 100, True), (130, 250, True), (64, 192, False)],
    "e4m3_ragged_blocks": [(128, 200, True), (0, 128, True), (100, 200, False)],
    # One scale for all rows is everybody's.
    "e4m3_dynamic": [(0, 32, True), (17, 40, True)],
}
ALL_CUTS = [(name, *cut) for name in CASES for cut in CUTS.get(name, [(16, 24, True)])]


@pytest.mark.parametrize(("name", "start", "stop", "offered"), ALL_CUTS)
def test_rows_are_cut_exactly_or_not_at_all(name: str, start: int, stop: int, offered: bool) -> None:
    layout, parts, *_ = case(name)
    cut = layout.select_rows(parts, start, stop)
    assert (cut is not None) == offered
    if cut is None:
        return
    piece, piece_parts = cut
    assert (piece.out_features, piece.in_features) == (stop - start, layout.in_features)
    piece.validate(piece_parts)
    assert torch.equal(piece.dequantize(piece_parts), layout.dequantize(parts)[start:stop])


@pytest.mark.parametrize("name", CASES)
def test_batch_is_cut_matrix_by_matrix(name: str) -> None:
    start, stop, offered = CUTS.get(name, [(16, 24, True)])[0]
    layout, parts, _ = batch(name, 2)
    cut = layout.select_rows(parts, start, stop)
    assert (cut is not None) == offered
    if cut is not None:
        cut[0].validate(cut[1])
        assert torch.equal(cut[0].dequantize(cut[1]), layout.dequantize(parts)[:, start:stop])


# Where a matrix can be cut in pieces that make it up again.
PIECES = {
    "nf4_nested": [0, 64, 96],
    "fp4_nested": [0, 64, 128],
    "hqq4_crossing_rows": [0, 16, 64, 96],
    "e4m3_blocks": [0, 128, 256],
    "e4m3_ragged_blocks": [0, 128, 200],
    "aqlm_1x16": [0, 8, 16, 32],
    "aqlm_2x8": [0, 8, 16, 32],
    "aqlm_3x6_2d_blocks": [0, 8, 16, 32],
    "nf4_ragged": None,
    # Each piece has the scale of all rows as its own: put together, that would be one scale a piece.
    "e4m3_dynamic": None,
    "quip_e8p12": None,
    "quip_e8p12_factor3": None,
    **{f"hqq{bits}_axis0": None for bits in (1, 2, 3, 4, 8)},
}


@pytest.mark.parametrize("name", [name for name in CASES if PIECES.get(name, [0]) is not None])
def test_pieces_make_up_the_whole(name: str) -> None:
    layout, parts, *_ = case(name)
    cuts = PIECES.get(name) or [0, 16, 24, layout.out_features]
    pieces = [layout.select_rows(parts, start, stop) for start, stop in pairwise(cuts)]
    assert all(piece is not None for piece in pieces)
    layouts, columns = zip(*[piece for piece in pieces if piece is not None], strict=True)
    whole = layouts[0].concat_rows(columns, layouts)
    assert whole is not None
    whole[0].validate(whole[1])
    assert torch.equal(whole[0].dequantize(whole[1]), layout.dequantize(parts))
    assert whole[0] == layout
    assert all(torch.equal(_bytes(whole[1][part]), _bytes(value)) for part, value in parts.items())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


STACKABLE: dict[str, bool] = {
    # Second-level groups of 256 scales: 384 of them (96 rows of 4) would let the second matrix begin in the middle of
    # one.
    "nf4_nested": False,
    "fp4_nested": True,
    "nf4_ragged": False,
    # Every matrix brings codebooks, a permutation or a divisor of its own.
    **dict.fromkeys(("aqlm_1x16", "aqlm_2x8", "aqlm_3x6_2d_blocks", "nvfp4"), False),
    **{f"gptq{bits}_act_order": False for bits in (2, 3, 4, 8)},
    **{f"hqq{bits}_axis0": False for bits in (1, 2, 3, 4, 8)},
    "quip_e8p12": False,
    "quip_e8p12_factor3": False,
    # 200 rows end in the middle of a block.
    "e4m3_ragged_blocks": False,
}


@pytest.mark.parametrize("name", CASES)
def test_different_matrices_are_stacked_exactly_or_not_at_all(name: str) -> None:
    first, second = case(name, 0), case(name, 1)
    stacked = first.layout.concat_rows([first.parts, second.parts], [first.layout, second.layout])
    assert (stacked is not None) == STACKABLE.get(name, True)
    if stacked is None:
        return
    layout, parts = stacked
    assert layout.out_features == 2 * first.layout.out_features
    layout.validate(parts)
    expected = torch.cat([one.layout.dequantize(one.parts) for one in (first, second)])
    assert torch.equal(layout.dequantize(parts), expected)


@pytest.mark.parametrize("name", ["gptq4_act_order", "nvfp4"])
def test_equal_companions_allow_stacking(name: str) -> None:
    """Gate and up projections see the same input: one permutation, one divisor."""
    first, second = case(name, 0), case(name, 1)
    shared = {part: first.parts[part] for part in ("in_perm", "scales_super") if part in first.parts}
    other = {**second.parts, **shared}
    stacked = first.layout.concat_rows([first.parts, other], [first.layout, second.layout])
    assert stacked is not None
    layout, parts = stacked
    layout.validate(parts)
    expected = torch.cat([first.layout.dequantize(first.parts), second.layout.dequantize(other)])
    assert torch.equal(layout.dequantize(parts), expected)


def test_other_layouts_are_not_stacked() -> None:
    first, second = case("hqq4_axis1"), case("hqq3_axis1")
    assert first.layout.concat_rows([first.parts, second.parts], [first.layout, second.layout]) is None
    # Equal but for the dtypes of scales and zeros, which say how exactly a formula is evaluated.
    assert first.layout.concat_rows([first.parts, case("awq").parts], [first.layout, case("awq").layout]) is None
    narrow: Layout = dataclasses.replace(first.layout, unit=0.5)  # type: ignore[call-arg]
    assert first.layout.concat_rows([first.parts, first.parts], [first.layout, narrow]) is None


@pytest.mark.parametrize(("rows", "offered"), [(96, True), (32, False)])
def test_per_tensor_scales_are_stacked_as_blocks_of_one_height(rows: int, offered: bool) -> None:
    first = case("e4m3_dynamic", 0)
    layout = dataclasses.replace(first.layout, out_features=rows, grid=Grid("block", rows, 256))  # type: ignore[call-arg]
    parts = {**case("e4m3_dynamic", 1).parts, "qweight": case("e4m3_dynamic", 1).parts["qweight"][:rows]}
    stacked = first.layout.concat_rows([first.parts, parts], [first.layout, layout])
    assert (stacked is not None) == offered
    if stacked is not None:
        assert stacked[0].grid == Grid("block", 96, 256)  # type: ignore[attr-defined]
        expected = torch.cat([first.layout.dequantize(first.parts), layout.dequantize(parts)])
        assert torch.equal(stacked[0].dequantize(stacked[1]), expected)


def test_blocks_as_high_as_the_matrix_are_stacked() -> None:
    """Two 128-row projections in 128 x 128 blocks fuse like any others."""
    layout = Float8(out_features=128, in_features=256, grid=Grid("block", 128, 128))
    parts = [
        {"qweight": torch.full((128, 256), value).to(layout.dtype), "scales": torch.tensor([[value, 2 * value]])}
        for value in (1.0, 3.0)
    ]
    stacked = layout.concat_rows(parts, [layout, layout])
    assert stacked is not None
    assert torch.equal(stacked[0].dequantize(stacked[1]), torch.cat([layout.dequantize(one) for one in parts]))


def test_meta_tensors_are_not_compared() -> None:
    """On the meta device nobody can say whether two tables agree, so only one and the same table does."""
    layout, parts, *_ = case("nf4_nested")
    half = layout.select_rows(parts, 0, 64)
    assert half is not None
    one, other = ({name: part.to("meta") for name, part in half[1].items()} for _ in range(2))
    assert half[0].concat_rows([one, other], [half[0]] * 2) is None
    assert half[0].concat_rows([one, one], [half[0]] * 2) is not None


def test_with_rows_keeps_the_grid() -> None:
    layout = Affine(out_features=64, in_features=32, bits=4, grid=Grid("block", 16, 8))
    assert layout.with_rows(128) == dataclasses.replace(layout, out_features=128)
    assert layout.with_rows(8) == dataclasses.replace(layout, out_features=8)
