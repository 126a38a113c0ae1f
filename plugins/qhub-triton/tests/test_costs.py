"""Guesses of the products' times know that some weights are more work to widen."""

from __future__ import annotations

import torch
from qhub_triton.tiled.costs import cost, wide_cost

from qhub.kernels import Problem
from qhub.layouts import Affine, Float8, Grid, Layout, Lookup
from qhub.layouts.tiled import Tiled


def _problem(layout: Layout) -> Problem:
    return Problem(Tiled(out_features=64, in_features=256, of=layout), "cuda", torch.bfloat16)


def test_rates_fall_with_the_work_of_widening() -> None:
    size = {"out_features": 64, "in_features": 256, "grid": Grid.along_k(64)}
    kinds = [Affine(**size, bits=4), Affine(**size, bits=4, zero="value"), Float8(**size), Lookup(**size)]
    rates = [cost(_problem(layout)).rate for layout in kinds]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 4
    assert cost(_problem(Affine(**size, bits=8))).rate == rates[1]
    assert all(wide_cost(_problem(layout)).rate > cost(_problem(layout)).rate for layout in kinds)


def test_tiles_of_256_rows_hide_most_of_it() -> None:
    size = {"out_features": 64, "in_features": 256, "grid": Grid.along_k(64)}
    kinds = [Affine(**size, bits=4, zero="value"), Affine(**size, bits=8), Float8(**size), Lookup(**size)]
    rates = [wide_cost(_problem(layout)).rate for layout in kinds]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0.8
    # A row's only scale is multiplied once.
    late = Float8(out_features=64, in_features=256, grid=Grid.along_k(256))
    assert wide_cost(_problem(late)).rate > rates[2]
    # There are none for words of 2 bits.
    narrow = Affine(**size, bits=2, zero="value")
    assert wide_cost(_problem(narrow)).rate < rates[0]
