"""The search for each group's grid: against brute force in float64, and never worse than the full range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qhub_awq import clipping
from qhub_awq.clipping import levels_of, quantize, refine, search_grids
from qhub_awq.rounding import Levels, block_diagonal, cost, prepared
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Affine, Grid

GROUP = 16


def _inputs(k: int, seed: int = 0) -> Tensor:
    """Return (400, K) inputs with correlated features of sizes from 0.1 to 3, as layers see them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    return torch.randn(400, k, generator=generator) @ mixing * torch.logspace(-1, 0.5, k)


def _hessian(k: int, seed: int = 0) -> Tensor:
    x = _inputs(k, seed)
    return x.t() @ x / len(x)


def _weight(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.02


def _layout(n: int, k: int, zero: str = "value") -> Affine:
    point = 8.0 if zero == "constant" else 0.0
    return Affine(out_features=n, in_features=k, bits=4, grid=Grid.along_k(GROUP), zero=zero, zero_point=point)  # type: ignore[arg-type]


def _output_error(layout: Affine, parts: dict[str, Tensor], weight: Tensor, x: Tensor) -> float:
    off = (layout.dequantize(parts) - weight).double()
    return float((x.double() @ off.t()).square().sum(-1).mean())


def _spanning(weight: Tensor, layout: Affine) -> dict[str, Tensor]:
    """Return the parts of plain rounding to nearest over each group's whole range, by autoawq's formula."""
    groups = weight.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    if layout.zero == "constant":
        scales = (torch.maximum(high, -low) / 7).half()
        parts = {"scales": scales}
    else:
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        parts = {"scales": scales, "zeros": zeros.to(torch.uint8)}
        if layout.zero == "offset":
            parts["zeros"] = -(scales.float() * zeros).half()
    return parts | layout.nearest(weight, parts)


def test_cost_is_the_mean_squared_change_of_outputs() -> None:
    x, error = _inputs(32), _weight(5, 32)
    hessian = x.t() @ x / len(x)
    expected = (x.double() @ error.double().t()).square().mean(0)
    # A sum of 32^2 products, each rounded to float32.
    torch.testing.assert_close(cost(error, hessian).squeeze(-1).double(), expected, rtol=1e-5, atol=0)


def test_blocks_are_those_of_the_diagonal() -> None:
    hessian = torch.arange(36.0).reshape(6, 6)
    assert torch.equal(block_diagonal(hessian, 2), torch.stack([hessian[i : i + 2, i : i + 2] for i in (0, 2, 4)]))


@pytest.mark.parametrize("levels", [Levels(), Levels(zero=8)], ids=["zeros", "symmetric"])
def test_each_group_gets_the_best_of_the_grids_tried(levels: Levels) -> None:
    """Brute force over ranges, group by group, in float64."""
    ranges = [(lower, upper) for lower in (1.0, 0.85, 0.7) for upper in (1.0, 0.85, 0.7)]
    w, hessian = _weight(6, 48).unflatten(-1, (-1, GROUP)), _hessian(48)
    scales, zeros = search_grids(w, hessian, levels, ranges)
    for row in range(6):
        for index in range(3):
            group, block = w[row, index].double(), block_diagonal(hessian, GROUP)[index].double()

            def loss(scale: float, zero: float, group: Tensor = group, block: Tensor = block) -> float:
                q = (group / scale + zero).round().clamp(0, 15)
                error = (q - zero) * scale - group
                return float(error @ block @ error)

            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            tried = []
            for lower, upper in ranges:
                if levels.zero is None:
                    scale = float(torch.tensor((high * upper - low * lower) / 15).half())
                    tried.append(loss(scale, min(max(round(-low * lower / scale), 0), 15)))
                elif lower == upper:
                    tried.append(loss(float(torch.tensor(max(high * upper / 7, -low * lower / 8)).half()), 8))
            found = loss(float(scales[row, index]), float(zeros[row, index]))
            # Float32 decides between grids whose costs differ by less than its rounding.
            assert found <= min(tried) * (1 + 1e-4)


@pytest.mark.parametrize("levels", [Levels(), Levels(zero=8)], ids=["zeros", "symmetric"])
def test_no_row_ends_worse_than_it_began(levels: Levels) -> None:
    w, hessian = _weight(24, 64).unflatten(-1, (-1, GROUP)), _hessian(64)
    scales, zeros = search_grids(w, hessian, levels)
    before = cost(levels.error(w, scales, zeros).flatten(1).double(), hessian.double())
    scales, zeros = refine(w, hessian, levels, scales, zeros)
    after = cost(levels.error(w, scales, zeros).flatten(1).double(), hessian.double())
    assert bool((after <= before * (1 + 1e-5)).all())
    # Measured 0.75 and 0.80 of it.
    assert float(after.sum()) < 0.9 * float(before.sum())
    assert bool((zeros == zeros.round()).all())
    assert torch.equal(scales, scales.half().float())


@pytest.mark.parametrize("levels", [Levels(), Levels(zero=8)], ids=["zeros", "symmetric"])
@pytest.mark.parametrize("at_once", [4, 27])
def test_candidates_tried_together_give_the_same(monkeypatch: pytest.MonkeyPatch, levels: Levels, at_once: int) -> None:
    w, hessian = _weight(200, 64).unflatten(-1, (-1, GROUP)), _hessian(64)
    start = search_grids(w, hessian, levels)
    one_by_one = refine(w, hessian, levels, *start)
    monkeypatch.setattr(clipping, "_candidates_at_once", lambda w: at_once)
    together = refine(w, hessian, levels, *start)
    # Sums in another order: candidates whose costs differ by less than that may change places.
    same = (one_by_one[0] == together[0]) & (one_by_one[1] == together[1])
    assert int(same.all(1).sum()) >= 196


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("zero", ["value", "constant"])
def test_a_gpu_finds_what_a_cpu_finds(zero: str) -> None:
    weight, hessian, layout = _weight(200, 64), _hessian(64), _layout(200, 64, zero)
    here = quantize(weight, layout, {"hessian": hessian})
    there = quantize(weight.cuda(), layout, {"hessian": hessian.cuda()})
    assert int((here["scales"] == there["scales"].cpu()).all(1).sum()) >= 190


@pytest.mark.parametrize("zero", ["value", "constant", "offset"])
def test_outputs_change_less_than_under_the_full_range(zero: str) -> None:
    weight, x = _weight(32, 64), _inputs(64)
    layout = _layout(32, 64, zero)
    parts = quantize(weight, layout, {"hessian": x.t() @ x / len(x)})
    layout.validate(parts)
    layout.check_values(parts)
    found = _output_error(layout, parts, weight, x)
    # Measured 0.55 to 0.68 of it; refining alone takes off a tenth.
    assert found < 0.75 * _output_error(layout, _spanning(weight, layout), weight, x)


def test_every_weight_is_rounded_to_the_nearest_level() -> None:
    weight, layout = _weight(8, 32), _layout(8, 32)
    parts = quantize(weight, layout, {"hessian": _hessian(32)})
    scale, zero = (parts[name].double().repeat_interleave(GROUP, 1) for name in ("scales", "zeros"))
    levels = scale.unsqueeze(-1) * (torch.arange(16).double() - zero.unsqueeze(-1))
    nearest = (levels - weight.double().unsqueeze(-1)).abs().amin(-1)
    off = (layout.dequantize(parts).double() - weight.double()).abs()
    assert bool((off <= nearest + 1e-6).all())


def test_rows_do_not_depend_on_each_other() -> None:
    """The engine puts layers that share an input on top of each other."""
    weight, statistics = _weight(24, 32), {"hessian": _hessian(32)}
    together = quantize(weight, _layout(24, 32), statistics)
    apart = [quantize(weight[rows], _layout(12, 32), statistics) for rows in (slice(0, 12), slice(12, 24))]
    assert all(torch.equal(part, torch.cat([one[name] for one in apart])) for name, part in together.items())


@pytest.mark.parametrize("case", ["zeros", "dead features", "no inputs", "one sign", "tiny", "bfloat16"])
def test_odd_weights_and_inputs(case: str) -> None:
    weight, hessian = _weight(8, 32), _hessian(32)
    if case == "zeros":
        weight[:, :GROUP] = 0
    elif case == "dead features":
        hessian[:GROUP], hessian[:, :GROUP] = 0, 0
    elif case == "no inputs":
        hessian.zero_()
    elif case == "one sign":
        weight = weight.abs() + 1
    elif case == "tiny":
        weight *= 1e-6
    else:
        weight = weight.bfloat16()
    before, layout = weight.clone(), _layout(8, 32)
    parts = quantize(weight, layout, {"hessian": hessian})
    layout.check_values(parts)
    assert torch.equal(weight, before)
    off = (layout.dequantize(parts) - weight.float()).norm() / weight.float().norm()
    # Rounding to 16 levels; the tiny ones lie among float16's smallest numbers, where steps are 2^-24.
    assert float(off) < (0.3 if case == "tiny" else 0.15)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(LayoutError, match="hessian"):
        quantize(_weight(8, 32), _layout(8, 32), {})
    with pytest.raises(LayoutError, match="groups of 16"):
        quantize(_weight(8, 40), _layout(8, 40), {"hessian": _hessian(40)})


def test_floors_keep_the_hessian_in_use() -> None:
    assert torch.equal(prepared(torch.zeros(3, 3)), torch.eye(3))
    found: Any = prepared(torch.diag(torch.tensor([1.0, 0.0])))
    assert float(found[1, 1]) > 0
    assert levels_of(_layout(8, 32, "constant")) == Levels(15, 8)
