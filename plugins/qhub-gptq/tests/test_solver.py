"""GPTQ's numbers: against the paper's algorithm in float64, and what each option promises."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

import pytest
import torch
from qhub_gptq.dynamic import Settings
from qhub_gptq.grids import Codes, ranged
from qhub_gptq.hessian import Damping, Order, feature_order, prepare, unit_factor
from qhub_gptq.plan import layout_of
from qhub_gptq.quantize import Options, quantize
from qhub_gptq.refine import refine
from qhub_gptq.solver import solve
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Affine

PLAIN = Options()


@dataclass(frozen=True)
class Problem:
    """Is a weight (N, K) and the second moments (K, K) of correlated inputs whose features differ in size."""

    weight: Tensor
    hessian: Tensor

    def layout(self, bits: int, group_size: int, sym: bool = True, desc_act: bool = False) -> Affine:
        """Return the layout of a config with these values."""
        return layout_of(Settings(bits, group_size, desc_act, sym), *self.weight.shape)

    def error(self, dense: Tensor) -> float:
        """Return tr((W - Q) H (W - Q)^t) in float64."""
        off = (self.weight - dense).double()
        return float(((off @ self.hessian.double()) * off).sum())


def problem(rows: int = 24, features: int = 96, seed: int = 0, tokens: int = 400) -> Problem:
    """Return a random layer, float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    sizes = torch.randn(features, generator=generator).exp()
    x = torch.randn(tokens, features, generator=generator) @ mixing * sizes
    return Problem(torch.randn(rows, features, generator=generator) / 8, x.t() @ x / tokens)


def naive(
    problem: Problem, bits: int, group: int, sym: bool, damp: float, order: Tensor, static: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (N, K), scales and zeros (N, G) in ``order``, by Frantar et al. 2022, section 3.2, eq. 2 and 3.

    After feature k is rounded, the others move by ``-(w_k - q_k) / [F^-1]_kk * [F^-1]_k`` with F the Hessian of the
    features that are left. Scales (float16) and zeros span the group as it is when its first feature's turn comes.
    """
    w, h = problem.weight.double()[:, order], problem.hessian.double()
    h = (h + damp * h.diagonal().mean() * torch.eye(len(h)))[order][:, order]
    inverse = torch.linalg.inv(h)
    codes, scales, zeros = torch.empty_like(w), [], []
    top = 2**bits - 1
    for k in range(w.shape[1]):
        if static or k % group == 0:
            members = w[:, k : k + group]
            if static:
                first = int(order[k]) // group * group
                members = problem.weight.double()[:, first : first + group]
            low, high = members.amin(1).clamp(max=0), members.amax(1).clamp(min=0)
            width = 2 * torch.maximum(high, -low) if sym else high - low
            scale = (width / top).half().double()
            zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low / scale).round().clamp(0, top)
            scales.append(scale)
            zeros.append(zero)
        codes[:, k] = ((w[:, k] / scale).round() + zero).clamp(0, top)
        error = (w[:, k] - scale * (codes[:, k] - zero)) / inverse[0, 0]
        w[:, k:] -= error[:, None] * inverse[0]
        inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)


def _dense(one: Problem, layout: Affine, options: Options = PLAIN, **more: Tensor) -> Tensor:
    parts = quantize(one.weight, layout, {"hessian": one.hessian, **more}, options)
    layout.validate(parts)
    return layout.dequantize(parts)


def _rounded(one: Problem, layout: Affine) -> Tensor:
    """Return the weight rounded to nearest: what GPTQ gives for features that have nothing to do with each other."""
    return _dense(dataclasses.replace(one, hessian=torch.eye(one.weight.shape[1])), layout)


@pytest.mark.parametrize(("bits", "group", "sym"), [(4, 32, True), (3, 48, False), (2, 10, False), (8, 96, True)])
@pytest.mark.parametrize("order", ["natural", "groups", "features"])
def test_solver_is_the_papers_algorithm(bits: int, group: int, sym: bool, order: Order) -> None:
    one = problem(features=96 if group != 10 else 64)
    features = one.weight.shape[1]
    taken = feature_order(one.hessian.diagonal(), group, order)
    taken = torch.arange(features) if taken is None else taken
    codes = Codes(bits, sym)
    h = one.hessian.double()[taken][:, taken]
    factor = unit_factor(h, Damping(0.05, 0))
    assert factor is not None
    found, scales, zeros = solve(
        one.weight.double().t()[taken].contiguous(), factor, group, codes.largest, lambda w, a, b: ranged(w, codes)
    )
    wanted, wanted_scales, wanted_zeros = naive(one, bits, group, sym, 0.05, taken)
    assert torch.equal(scales.t(), wanted_scales)
    assert torch.equal(zeros.t(), wanted_zeros)
    assert torch.equal(found.t() + zeros.t().repeat_interleave(group, 1)[:, :features], wanted)


def test_float32_takes_the_same_codes() -> None:
    # A code differs where float32's error (2^-24 times some hundreds) carries a quotient over a half: 1 in 10^4 or
    # fewer, and what follows in that row follows it.
    one = problem(rows=64)
    layout = one.layout(4, 32)
    parts = quantize(one.weight, layout, {"hessian": one.hessian}, PLAIN)
    wanted, scales, _ = naive(one, 4, 32, True, 0.05, torch.arange(96))
    same = (layout.codes(parts) == wanted).all(1)
    assert int(same.sum()) >= 62
    assert torch.equal(parts["scales"][same].double(), scales[same])


def test_act_order_is_a_permutation_of_groups_made_by_size() -> None:
    one = problem()
    layout = one.layout(4, 32, desc_act=True)
    parts = quantize(one.weight, layout, {"hessian": one.hessian}, Options(order="features"))
    taken = torch.argsort(one.hessian.diagonal(), descending=True)
    perm = parts["in_perm"].long()
    for group in range(3):
        members = perm[32 * group : 32 * group + 32]
        assert members.tolist() == sorted(taken[32 * group : 32 * group + 32].tolist())
    wanted, scales, zeros = naive(one, 4, 32, True, 0.05, taken)
    dense = (wanted - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
    off = layout.dequantize(parts)[:, taken].double() - dense
    assert (off.abs().amax(1) < 1e-6).double().mean() > 0.9


@pytest.mark.parametrize("order", ["features", "groups"])
def test_static_groups_keep_the_untouched_weights_scales(order: Order) -> None:
    one = problem()
    layout = one.layout(4, 32, sym=False)
    parts = quantize(one.weight, layout, {"hessian": one.hessian}, Options(order=order, static_groups=True))
    taken = feature_order(one.hessian.diagonal(), 32, order)
    assert taken is not None
    wanted, scales, _ = naive(one, 4, 32, False, 0.05, taken, static=True)
    back = torch.argsort(taken)
    assert torch.equal(parts["scales"].double(), scales[:, back][:, ::32])
    assert (layout.codes(parts) == wanted[:, back]).all(1).double().mean() > 0.9


def test_group_aware_order_takes_whole_groups() -> None:
    diagonal = torch.tensor([1.0, 5.0, 9.0, 2.0, 3.0, 3.0, 100.0])
    assert feature_order(diagonal, 2, "groups") is not None
    assert feature_order(diagonal, 2, "groups").tolist() == [2, 3, 1, 0, 4, 5, 6]  # type: ignore[union-attr]
    assert feature_order(diagonal, 7, "groups").tolist() == [6, 2, 1, 4, 5, 3, 0]  # type: ignore[union-attr]
    assert feature_order(diagonal, 2, "natural") is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1, 40])
@pytest.mark.parametrize("sym", [True, False])
def test_error_is_below_that_of_rounding_to_nearest(bits: int, group: int, sym: bool) -> None:
    one = problem(rows=48, features=160, seed=bits)
    for order in ("natural", "groups", "features"):
        layout = one.layout(bits, group, sym, desc_act=order == "features")
        plain = one.layout(bits, group, sym)
        assert one.error(_dense(one, layout, Options(order=order))) < one.error(_rounded(one, plain))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("order", ["natural", "groups", "features"])
def test_high_quality_has_the_smaller_error(bits: int, sym: bool, order: Order) -> None:
    for seed in range(3):
        one = problem(rows=32, features=128, seed=seed)
        layout = one.layout(bits, 32, sym, desc_act=order == "features")
        plain = one.error(_dense(one, layout, Options(order=order)))
        assert one.error(_dense(one, layout, Options(order=order, high=True))) < 0.95 * plain


def test_coordinate_descent_ends_where_no_code_should_move() -> None:
    one = problem(rows=12, features=160, seed=5)
    hessian, target = one.hessian, one.weight.t().contiguous()
    scale, zero = ranged(target[:80], Codes(3, False))
    scales, zeros = torch.stack([scale, scale * 1.5]).half().float(), torch.stack([zero, zero])
    spread = torch.arange(160) // 80
    codes = (target / scales[spread]).round().clamp(-zeros[spread], 7 - zeros[spread])
    before = one.error((codes * scales[spread]).t())
    refine(target, hessian, codes, scales, zeros, 80, 7, 40)
    assert torch.equal(scales, scales.half().float())
    off = target - codes * scales[spread]
    assert one.error((codes * scales[spread]).t()) < 0.7 * before
    # Moving code k by d changes the error by -2 d s G_k + (d s)^2 H_kk: nowhere below 0 but for float32's rounding.
    gradient, step = hessian @ off, scales[spread]
    for d in (-1, 1):
        allowed = (codes + d >= -zeros[spread]) & (codes + d <= 7 - zeros[spread])
        change = -2 * d * step * gradient + (step**2) * hessian.diagonal()[:, None]
        assert float((change / (step**2 * hessian.diagonal()[:, None]))[allowed].min()) > -1e-3


def test_high_quality_makes_up_for_inputs_that_differ() -> None:
    one = problem(rows=32, features=96, seed=3, tokens=4000)
    # The float model's input is a mixture of the quantized model's features: its outputs are W M x.
    mixing = torch.eye(96) + 0.05 * torch.randn(96, 96, generator=torch.Generator().manual_seed(1))
    wanted = dataclasses.replace(one, weight=one.weight @ mixing)
    layout = one.layout(4, 32, sym=False)
    without = wanted.error(_dense(one, layout, Options(high=True)))
    assert wanted.error(_dense(one, layout, Options(high=True), cross=mixing @ one.hessian)) < 0.5 * without


def test_cross_equal_to_the_hessian_changes_nothing() -> None:
    one = problem()
    layout, high = one.layout(3, 32), Options(high=True)
    assert torch.equal(_dense(one, layout, high, cross=one.hessian), _dense(one, layout, high))


def test_dead_features_are_rounded_and_touch_nothing_else() -> None:
    one = problem()
    alive = [k for k in range(96) if k not in (3, 40)]
    hessian = one.hessian.clone()
    hessian[[3, 40]] = 0
    hessian[:, [3, 40]] = 0
    static = Options(static_groups=True, damping=Damping(0.05, 0))
    layout = one.layout(4, 32)
    dense = _dense(dataclasses.replace(one, hessian=hessian), layout, static)
    assert torch.equal(dense[:, [3, 40]], _rounded(one, layout)[:, [3, 40]])
    moved = dataclasses.replace(one, weight=one.weight.clone(), hessian=hessian)
    moved.weight[:, [3, 40]] *= 0.5
    # Twice smaller weights leave each group's range as it was where they did not set it.
    same = (_dense(moved, layout, static) == dense)[:, alive].all(1)
    widest = one.weight.reshape(24, 3, 32).abs().argmax(2) + torch.tensor([0, 32, 64])
    assert bool(same[((widest != 3) & (widest != 40)).all(1)].all())


def test_dead_features_stay_where_the_inputs_differ() -> None:
    one = problem()
    hessian, cross = one.hessian.clone(), one.hessian.clone() * 1.01
    for moments in (hessian, cross):
        moments[3] = 0
        moments[:, 3] = 0
    static = Options(static_groups=True, high=True)
    layout = one.layout(8, 32)
    dense = _dense(dataclasses.replace(one, hessian=hessian), layout, static, cross=cross)
    # Half a step of 8 bits, each group's range cut to 0.3 of it at most.
    assert float((dense[:, 3] - one.weight[:, 3]).abs().max()) < float(one.weight.abs().max()) / 127


def test_a_hessian_of_zeros_rounds_to_nearest() -> None:
    one = problem()
    layout = one.layout(4, 32)
    dense = _dense(dataclasses.replace(one, hessian=torch.zeros(96, 96)), layout)
    assert torch.equal(dense, _rounded(one, layout))


def test_damping_rises_until_the_hessian_factors() -> None:
    one = problem()
    # An eigenvalue below 0 that 0.05 of the mean does not lift above it: 0.2 does.
    values, vectors = torch.linalg.eigh(one.hessian)
    values[0] = -0.15 * one.hessian.diagonal().mean()
    indefinite = (vectors * values) @ vectors.t()
    with pytest.warns(UserWarning, match="damp_percent=0.2 instead of 0.05"):
        factor = unit_factor(indefinite, Damping(0.05, 0.01))
    assert factor is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unit_factor(indefinite, Damping(0.05, 0)) is None
        assert unit_factor(one.hessian, Damping(0.05, 0.01)) is not None


def test_a_hessian_that_never_factors_is_rounded_with_a_warning() -> None:
    one = problem()
    layout = one.layout(4, 32)
    hessian = one.hessian - 3 * one.hessian.diagonal().mean() * torch.ones(96, 96) / 96
    hessian.diagonal().clamp_(min=1e-3)
    hessian = hessian - 2 * torch.ones(96, 96)
    hessian.diagonal().add_(2)
    with pytest.warns(UserWarning, match="rounded to nearest"):
        dense = _dense(dataclasses.replace(one, hessian=hessian), layout)
    assert torch.equal(dense, _rounded(one, layout))


def test_what_is_not_finite_is_refused() -> None:
    one = problem()
    layout = one.layout(4, 32)
    for value in (float("nan"), float("inf")):
        bad = one.hessian.clone()
        bad[5, 5] = value
        with pytest.raises(LayoutError, match="activations overflow"):
            _dense(dataclasses.replace(one, hessian=bad), layout)
        weight = one.weight.clone()
        weight[3, 5] = value
        with pytest.raises(LayoutError, match="weight of 24x96"):
            _dense(dataclasses.replace(one, weight=weight), layout)
        with pytest.raises(LayoutError, match="unquantized model"):
            _dense(one, layout, cross=bad)
    with pytest.raises(LayoutError, match="24x96"):
        _dense(dataclasses.replace(one, weight=one.weight[:4]), layout)
    with pytest.raises(LayoutError, match="float16 scale"):
        _dense(dataclasses.replace(one, weight=one.weight * 1e7), layout)


@pytest.mark.parametrize("high", [False, True])
def test_rows_do_not_depend_on_each_other_and_runs_repeat(high: bool) -> None:
    one = problem(rows=64)
    layout, options = one.layout(4, 32, sym=False), Options(order="groups", high=high)
    whole = _dense(one, layout, options)
    assert torch.equal(whole, _dense(one, layout, options))
    halves = [dataclasses.replace(one, weight=half) for half in one.weight.split(32)]
    apart = torch.cat([_dense(half, half.layout(4, 32, sym=False), options) for half in halves])
    # Products of other shapes round differently, so a code on a half may fall the other way.
    assert int((apart == whole).all(1).sum()) >= 60


def test_inputs_are_left_alone() -> None:
    one = problem()
    weight, hessian = one.weight.clone(), one.hessian.clone()
    _dense(one, one.layout(2, 32, sym=False), Options(order="features", high=True), cross=one.hessian)
    assert torch.equal(weight, one.weight)
    assert torch.equal(hessian, one.hessian)


def test_prepare_fills_in_the_mean_of_the_others() -> None:
    assert prepare(torch.diag(torch.tensor([1.0, 0.0, 3.0]))).diagonal().tolist() == [1, 2, 3]
    assert prepare(torch.zeros(2, 2)).diagonal().tolist() == [1, 1]


def test_groups_of_zeros_and_tiny_weights() -> None:
    one = problem()
    weight = one.weight.clone()
    weight[0], weight[1] = 0, weight[1] * 1e-7
    for high in (False, True):
        dense = _dense(dataclasses.replace(one, weight=weight), one.layout(4, 32, sym=False), Options(high=high))
        assert bool((dense[0] == 0).all())
        assert bool(torch.isfinite(dense).all())
