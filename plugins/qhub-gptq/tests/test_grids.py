"""The search for scales: several widths at a time, as on a GPU, find what one after the other finds."""

from __future__ import annotations

import pytest
import torch
from qhub_gptq import grids
from qhub_gptq.grids import Codes, searched
from torch import Tensor


def _group(rows: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, rows, generator=generator)
    weight[:, 0], weight[:, 1] = 0, weight[:, 1].abs()
    return weight, torch.rand(128, generator=generator) + 0.1


@pytest.mark.parametrize("at_once", [2, 8, 40])
@pytest.mark.parametrize("codes", [Codes(4, True), Codes(4, False), Codes(2, False)])
def test_widths_tried_together_give_the_same(monkeypatch: pytest.MonkeyPatch, at_once: int, codes: Codes) -> None:
    weight, importance = _group()
    one_by_one = searched(weight, importance, codes)
    monkeypatch.setattr(grids, "_widths_at_once", lambda weight: at_once)
    together = searched(weight, importance, codes)
    # Sums of 128 numbers in another order: two widths whose costs differ by less than that may change places.
    same = (one_by_one[0] == together[0]) & (one_by_one[1] == together[1])
    assert int(same.sum()) >= 298


@pytest.mark.parametrize(("features", "rows", "expected"), [(128, 4096, 40), (128, 28672, 20), (14336, 4096, 1)])
def test_a_gpu_takes_as_many_widths_as_its_piece_holds(features: int, rows: int, expected: int) -> None:
    # A tensor that says it is on a GPU takes no memory on the meta device.
    assert grids._widths_at_once(torch.empty(features, rows, device="meta")) == expected


def test_the_width_with_the_least_cost_is_found() -> None:
    weight, importance = _group(20)
    codes = Codes(3, True)
    scale, zero = searched(weight, importance, codes)
    cost = _cost(weight, importance, scale, zero, codes)
    widest = 2 * weight.abs().amax(0) / codes.largest
    for share in torch.linspace(0.3, 1.05, 40, dtype=torch.float64):
        tried = (widest * share.float()).half().float().clamp_min(2.0**-24)
        assert bool((cost <= _cost(weight, importance, tried, zero, codes) * (1 + 1e-4)).all())


def _cost(weight: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, codes: Codes) -> Tensor:
    rounded = (weight.double() / scale).round().clamp(-zero, codes.largest - zero) * scale
    return importance.double() @ (weight - rounded).square()
