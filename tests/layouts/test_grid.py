"""Groups: which weights share a scale, for any shape, against counting by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qhub.errors import LayoutError
from qhub.layouts import Grid
from qhub.layouts.grid import covering

SIZES = st.integers(1, 12)


@st.composite
def _grids(draw: st.DrawFn) -> tuple[Grid, int, int]:
    n, k = draw(SIZES), draw(SIZES)
    kind = draw(st.sampled_from(["block", "flat", "strided"]))
    if kind == "block":
        return Grid("block", draw(SIZES), draw(SIZES)), n, k
    if kind == "flat":
        return Grid("flat", 1, draw(st.integers(1, 40))), n, k
    divisors = [d for d in range(1, n * k + 1) if n * k % d == 0]
    return Grid("strided", 1, draw(st.sampled_from(divisors))), n, k


def _group(grid: Grid, n: int, k: int, row: int, column: int) -> tuple[int, ...]:
    """Return the place of the scale of weight (row, column), by the definition of each kind."""
    if grid.kind == "block":
        return row // grid.rows, column // grid.cols
    position = row * k + column
    return (position // grid.cols,) if grid.kind == "flat" else (position % (n * k // grid.cols),)


def _scales(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)


@given(_grids())
def test_each_weight_meets_its_own_scale(case: tuple[Grid, int, int]) -> None:
    grid, n, k = case
    scales = _scales(grid.scale_shape(n, k))
    spread = grid.join(grid.split(torch.ones(n, k)) * grid.spread(scales), n, k)
    expected = torch.tensor([[float(scales[_group(grid, n, k, i, j)]) for j in range(k)] for i in range(n)])
    assert torch.equal(spread, expected)
    assert set(expected.flatten().tolist()) == set(scales.flatten().tolist()), "a scale without weights"


@given(_grids(), st.lists(st.integers(1, 3), max_size=2))
def test_join_undoes_split(case: tuple[Grid, int, int], batch: list[int]) -> None:
    grid, n, k = case
    weight = torch.arange(float(math.prod([*batch, n, k]))).reshape(*batch, n, k)
    assert torch.equal(grid.join(grid.split(weight), n, k), weight)


@given(_grids(), st.lists(st.integers(1, 3), max_size=2))
def test_member_axes_reduce_to_the_scales(case: tuple[Grid, int, int], batch: list[int]) -> None:
    """The largest member of each group, taken along ``member_dims``, in the order and shape of the scales."""
    grid, n, k = case
    weight = torch.rand(*batch, n, k, generator=torch.Generator().manual_seed(n * 100 + k)) + 0.1
    shape = grid.scale_shape(n, k)
    found = grid.split(weight).amax(grid.member_dims).reshape(*batch, *shape)
    expected = torch.zeros(*batch, *shape)
    for i in range(n):
        for j in range(k):
            place: Any = (..., *_group(grid, n, k, i, j))
            expected[place] = torch.maximum(expected[place], weight[..., i, j])
    assert torch.equal(found, expected)


@given(_grids(), st.data())
def test_row_slice_is_exact_when_offered(case: tuple[Grid, int, int], data: st.DataObject) -> None:
    grid, n, k = case
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    cut = grid.row_slice(start, stop, k)
    if grid.kind == "strided":
        assert cut is None
        return
    # Exact means: the weights that shared a scale in the slice still do, counted from the slice's first row.
    before = [_group(grid, n, k, i, j) for i in range(start, stop) for j in range(k)]
    after = [_group(grid, stop - start, k, i, j) for i in range(stop - start) for j in range(k)]
    same_partition = len(set(zip(before, after, strict=True))) == len(set(before)) == len(set(after))
    assert (cut is not None) == same_partition
    if cut is None:
        return
    window, axis = cut
    scales = _scales(grid.scale_shape(n, k))
    own = scales[window] if axis == -1 or scales.ndim == 1 else scales[window, :]
    rows = stop - start
    assert tuple(own.shape) == grid.scale_shape(rows, k)
    whole = grid.join(grid.split(torch.ones(n, k)) * grid.spread(scales), n, k)
    piece = grid.join(grid.split(torch.ones(rows, k)) * grid.spread(own), rows, k)
    assert torch.equal(piece, whole[start:stop])


@given(_grids())
def test_fits_means_no_padding(case: tuple[Grid, int, int]) -> None:
    grid, n, k = case
    assert grid.fits(n, k) == (grid.split(torch.ones(n, k)).numel() == n * k)


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 12))
def test_covering(start: int, count: int, size: int) -> None:
    stop = start + count
    window = covering(start, stop, size)
    groups = [i // size for i in range(start, stop)]
    anew = [(i - start) // size + groups[0] for i in range(start, stop)]
    assert (window is not None) == (groups == anew)
    if window is not None:
        assert list(range(window.start, window.stop)) == sorted(set(groups))


@given(SIZES, st.integers(1, 40))
def test_flat_runs_are_blocks_where_rows_hold_whole_runs(k: int, group: int) -> None:
    grid = Grid.flat_runs(group, k)
    assert grid.kind == ("block" if k % group == 0 else "flat")
    assert grid.scale_shape(4, k) == ((4, k // group) if grid.kind == "block" else (-(-4 * k // group),))


def test_strided_groups_must_divide() -> None:
    with pytest.raises(LayoutError, match="strided groups of 5 do not divide a 4x8 matrix"):
        Grid("strided", 1, 5).scale_shape(4, 8)


@pytest.mark.parametrize("size", [-1, 0])
def test_groups_have_members(size: int) -> None:
    for make in (lambda: Grid.along_k(size), lambda: Grid("block", size, 4), lambda: Grid.flat_runs(size, 8)):
        with pytest.raises(LayoutError, match="choose positive sizes"):
            make()


def test_block_higher_than_the_matrix_adds_no_rows() -> None:
    assert Grid("block", 4096, 4096).split(torch.ones(2, 3)).shape == (1, 2, 1, 3)
