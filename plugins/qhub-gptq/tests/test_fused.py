"""The kernels for GPUs: the numbers of the loops, but for the order of its sums; where it is used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from qhub_gptq import refine, solver
from qhub_gptq.fused import fused_kernels
from qhub_gptq.grids import Codes, ranged, searched
from qhub_gptq.hessian import Damping, unit_factor

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def _problem(features: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * features, features, generator=generator)
    x = x @ (torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features))
    factor = unit_factor(x.t() @ x / len(x), Damping(0.05, 0))
    assert factor is not None
    return torch.randn(features, rows, generator=generator) / 8, factor


def test_other_devices_and_dtypes_keep_the_loop() -> None:
    assert fused_kernels(torch.device("cpu"), torch.float32) is None
    assert fused_kernels(torch.device("cuda"), torch.float64) is None


def test_a_kernel_that_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    fused_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"Triton .*RuntimeError: Failed to find C compiler"):
            assert fused_kernels(torch.device("cuda"), torch.float32) is None
    finally:
        fused_kernels.cache_clear()


@gpu
@pytest.mark.parametrize(("features", "rows", "group"), [(256, 300, 128), (200, 64, 40), (96, 1, 32), (160, 130, 160)])
def test_the_kernel_takes_the_codes_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, features: int, rows: int, group: int
) -> None:
    weight, factor = (one.cuda() for one in _problem(features, rows))
    codes = Codes(4, False)
    assert fused_kernels(weight.device, weight.dtype) is not None
    arguments = factor, group, codes.largest, lambda w, a, b: ranged(w, codes)
    found = solver.solve(weight.clone(), *arguments)
    monkeypatch.setattr(solver, "fused_kernels", lambda device, dtype: None)
    wanted = solver.solve(weight.clone(), *arguments)
    # Where a quotient lies within float32's rounding of a half the code, and what follows in that row, may differ.
    same = (found[0] == wanted[0]).all(0)
    assert int((~same).sum()) <= max(1, rows // 30)
    assert torch.equal(found[1][:, same], wanted[1][:, same])


@gpu
def test_the_kernel_takes_scattered_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factor = (one.cuda() for one in _problem(128, 200))
    codes, order = Codes(3, True), torch.randperm(128, generator=torch.Generator().manual_seed(1)).cuda()
    pairs = [ranged(weight[start : start + 32], codes) for start in range(0, 128, 32)]
    fixed = torch.stack([scale for scale, _ in pairs]), torch.stack([zero for _, zero in pairs])
    arguments = factor, 32, codes.largest, (order // 32).tolist(), fixed
    found = solver.solve(weight[order], *arguments)
    monkeypatch.setattr(solver, "fused_kernels", lambda device, dtype: None)
    wanted = solver.solve(weight[order], *arguments)
    assert int((found[0] != wanted[0]).any(0).sum()) <= 6


@gpu
@pytest.mark.parametrize(("features", "rows", "group"), [(256, 300, 128), (100, 64, 40)])
def test_descent_takes_the_codes_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, features: int, rows: int, group: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * features, features, generator=generator)
    x = x @ (torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features))
    hessian = (x.t() @ x / len(x)).cuda()
    target, codes = torch.randn(features, rows, generator=generator).cuda() / 8, Codes(3, False)
    pairs = [ranged(target[start : start + group], codes) for start in range(0, features, group)]
    scales, zeros = torch.stack([scale for scale, _ in pairs]), torch.stack([zero for _, zero in pairs])
    spread = torch.arange(features, device="cuda") // group
    start = (target / scales[spread]).round().clamp(-zeros[spread], 7 - zeros[spread])
    found, wanted = (start.clone(), scales.clone()), (start.clone(), scales.clone())
    refine.refine(target, hessian, *found, zeros, group, 7, 2)
    monkeypatch.setattr(refine, "fused_kernels", lambda device, dtype: None)
    refine.refine(target, hessian, *wanted, zeros, group, 7, 2)
    assert not torch.equal(found[0], start)
    same = (found[0] == wanted[0]).all(0)
    assert int((~same).sum()) <= max(1, rows // 20)
    assert torch.equal(found[1][:, same], wanted[1][:, same])


@gpu
def test_a_gpu_finds_the_scales_of_a_cpu() -> None:
    weight, importance = torch.randn(128, 1000, generator=torch.Generator().manual_seed(0)), torch.rand(128) + 0.1
    for codes in (Codes(4, True), Codes(2, False)):
        here = searched(weight, importance, codes)
        there = searched(weight.cuda(), importance.cuda(), codes)
        same = (here[0] == there[0].cpu()) & (here[1] == there[1].cpu())
        assert int(same.sum()) >= 990
