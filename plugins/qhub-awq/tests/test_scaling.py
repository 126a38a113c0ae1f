"""The search for input scales: ties kept, never worse than 1, and worth having where inputs differ in size."""

from __future__ import annotations

import pytest
import torch
from qhub_awq.clipping import quantize
from qhub_awq.noise import least_noise, noise
from qhub_awq.rounding import Levels, cost
from qhub_awq.scaling import candidates, joined, scaled_errors, search_scales
from torch import Tensor

from qhub.layouts import Affine, Grid

GROUP = 32


def _problem(k: int = 128, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Affine], dict[str, Tensor]]:
    """Return two matrices and statistics of an input with a few features twenty times the others' size."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.ones(k)
    size[torch.randperm(k, generator=generator)[: k // 16]] = 20.0
    x = torch.randn(600, k, generator=generator) * size
    weights = {name: torch.randn(n, k, generator=generator) * 0.1 for name, n in (("a", 48), ("b", 24))}
    layouts = {
        name: Affine(out_features=len(w), in_features=k, bits=4, grid=Grid.along_k(GROUP), zero="value")
        for name, w in weights.items()
    }
    statistics = {"hessian": x.t() @ x / len(x), "mean_abs": x.abs().mean(0), "tokens": torch.tensor(len(x))}
    return weights, layouts, statistics


def _final_cost(
    weights: dict[str, Tensor], layouts: dict[str, Affine], statistics: dict[str, Tensor], s: Tensor
) -> float:
    """Return what the outputs change by, in float64, when ``weight * s`` is quantized and the input divided by s."""
    hessian, total = statistics["hessian"], 0.0
    for name, weight in weights.items():
        parts = quantize(weight * s, layouts[name], {"hessian": hessian / (s[:, None] * s)})
        off = (layouts[name].dequantize(parts) / s - weight).double()
        total += float(((off @ hessian.double()) * off).sum())
    return total


def test_outputs_change_less_than_without_scales() -> None:
    weights, layouts, statistics = _problem()
    s = search_scales(weights, layouts, statistics, None)
    assert s is not None
    assert s.shape == (128,)
    assert s.dtype == torch.float32
    assert bool((torch.isfinite(s) & (s > 0)).all())
    ratio = _final_cost(weights, layouts, statistics, s) / _final_cost(weights, layouts, statistics, torch.ones(128))
    # Measured 0.39.
    assert ratio < 0.6


@pytest.mark.parametrize("seed", range(4))
def test_the_searched_cost_is_never_above_that_of_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights, layouts, statistics = _problem(seed=seed)
    if seed % 2:
        # Nothing to gain: features alike, and related to each other.
        x = torch.randn(500, 128, generator=generator) + torch.randn(500, 1, generator=generator)
        statistics |= {"hessian": x.t() @ x / len(x), "mean_abs": x.abs().mean(0)}
    s = search_scales(weights, layouts, statistics, None)
    if s is None:
        return
    w = torch.cat(list(weights.values())).unflatten(-1, (-1, GROUP))
    found, one = (
        float(cost(errors.flatten(1), hessian).sum())
        for errors, hessian in (
            scaled_errors(w, statistics["hessian"], scale.view(-1, GROUP), Levels()) for scale in (s, torch.ones(128))
        )
    )
    assert found < one


def test_tied_features_share_a_scale() -> None:
    """Heads of 32 features, each value head read by two query heads of different groups."""
    weights, layouts, statistics = _problem()
    tied = torch.arange(64).view(2, 1, 32).expand(2, 2, 32).reshape(-1)
    s = search_scales(weights, layouts, statistics, tied)
    assert s is not None
    for number in range(64):
        assert len(s[tied == number].unique()) == 1
    assert len(s.unique()) > 8


def test_groups_joined_by_ties_decide_together() -> None:
    device = torch.device("cpu")
    assert joined(None, 3, 4, device).tolist() == [0, 1, 2]
    assert joined(torch.arange(12), 3, 4, device).tolist() == [0, 1, 2]
    assert joined(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]), 3, 4, device).tolist() == [0, 1, 0]
    # A chain: 0-1 by one feature, 1-2 by another.
    assert joined(torch.tensor([0, 1, 2, 3, 0, 4, 5, 6, 6, 7, 8, 9]), 3, 4, device).tolist() == [0, 0, 0]


def test_one_comes_first_among_the_candidates() -> None:
    weights, _, statistics = _problem()
    w = weights["a"].unflatten(-1, (-1, GROUP))
    tried = list(candidates(w, statistics["hessian"], statistics["mean_abs"], None))
    assert torch.equal(tried[0], torch.ones(4, GROUP))
    assert all(bool((torch.isfinite(s) & (s > 0)).all()) for s in tried)
    # A feature twenty times as large is scaled up by every other candidate.
    large = (statistics["mean_abs"] > 5).view(4, GROUP)
    for s in tried[1:]:
        relative = s / s.mean(-1, keepdim=True)
        assert float(relative[large].mean()) > float(relative[~large].mean())


def test_nothing_is_known_of_inputs_that_were_never_seen() -> None:
    weights, layouts, statistics = _problem()
    assert search_scales(weights, layouts, {**statistics, "tokens": torch.tensor(0)}, None) is None


@pytest.mark.parametrize("dead", [1, 32, 128])
def test_dead_features_give_finite_scales(dead: int) -> None:
    weights, layouts, statistics = _problem()
    statistics["hessian"][:dead], statistics["hessian"][:, :dead], statistics["mean_abs"][:dead] = 0, 0, 0
    s = search_scales(weights, layouts, statistics, None)
    assert s is None or bool((torch.isfinite(s) & (s > 0) & (s < 1e4) & (s > 1e-4)).all())


def test_what_is_given_stays_as_it_is() -> None:
    weights, layouts, statistics = _problem()
    before = {**{f"w{n}": w.clone() for n, w in weights.items()}, **{n: t.clone() for n, t in statistics.items()}}
    search_scales(weights, layouts, statistics, None)
    assert all(torch.equal(before[f"w{n}"], w) for n, w in weights.items())
    assert all(torch.equal(before[n], t) for n, t in statistics.items())


@pytest.mark.parametrize("power", [6.0, 12.0])
def test_least_noise_is_a_minimum(power: float) -> None:
    """No step along any feature, in float64, lowers the estimate; and it lies far below that of s = 1."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(40, 2, 16, generator=generator).double()
    diagonal = torch.exp(torch.randn(2, 16, generator=generator)).double()
    log_s = least_noise(w, diagonal, power, None)
    least = noise(w, diagonal, log_s, power)
    assert bool((least < 0.95 * noise(w, diagonal, torch.zeros_like(log_s), power)).all())
    for index in range(16):
        for step in (0.02, -0.02):
            moved = log_s.clone()
            moved[:, index] += step
            assert bool((noise(w, diagonal, moved, power) > least).all())


def test_least_noise_keeps_ties() -> None:
    generator = torch.Generator().manual_seed(3)
    w, tied = torch.randn(40, 2, 16, generator=generator), torch.arange(16).repeat(2)
    diagonal = torch.exp(torch.randn(2, 16, generator=generator))
    log_s = least_noise(w, diagonal, 6.0, tied).flatten()
    assert torch.equal(log_s[:16], log_s[16:])
    assert float(noise(w, diagonal, log_s.view(2, 16), 6.0).sum()) < float(
        noise(w, diagonal, torch.zeros(2, 16), 6.0).sum()
    )
