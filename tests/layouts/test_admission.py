"""A kernel for a tall matrix is compared at its beginning, in its middle and at its end."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from qhub import hookimpl
from qhub.kernels import KernelSpec, dispatch, reference
from qhub.kernels.spec import Problem
from qhub.layouts import Affine, Grid
from qhub.registry import registry

ROWS = 9000


@pytest.fixture
def offered(monkeypatch):
    """Return a function that offers a kernel whose output is multiplied by 2 in the given rows."""

    def offer(wrong: slice) -> None:
        def run(x, layout, parts, bias=None):
            y = reference.linear(x, layout, parts, bias).clone()
            y[:, wrong] *= 2
            return y

        module = types.ModuleType("tall_kernel")
        module.run = run
        monkeypatch.setitem(sys.modules, "tall_kernel", module)
        registry.register(Kernels(), "tall-kernel", group="qhub.kernels")
        dispatch.forget()

    yield offer
    registry.unregister("tall-kernel", group="qhub.kernels")
    dispatch.forget()


class Kernels:
    @hookimpl
    def qhub_kernels(self):
        yield KernelSpec(name="tall", impl="tall_kernel:run", layout="affine", rank=1_000_000)


def chosen() -> dispatch.Choice:
    layout = Affine(out_features=ROWS, in_features=32, bits=4, grid=Grid.along_k(32), zero_point=8.0)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (ROWS, 32), generator=generator)
    parts = {"qweight": layout.pack_codes(codes), "scales": torch.rand(ROWS, 1, generator=generator) + 0.5}
    return dispatch.choose(layout, parts, torch.float32)


def test_right_everywhere_is_taken(offered):
    offered(slice(0, 0))
    assert chosen().refused.get("tall") is None


@pytest.mark.parametrize("wrong", [slice(0, 500), slice(4100, 4600), slice(ROWS - 5, ROWS), slice(0, ROWS, 2)])
def test_wrong_in_one_place_is_refused(offered, wrong):
    offered(wrong)
    with pytest.warns(RuntimeWarning, match="wrong result"):
        choice = chosen()
    assert "relative error" in choice.refused["tall"]


def test_the_problem_names_the_layout(offered):
    offered(slice(0, 0))
    assert isinstance(chosen().problem, Problem)
