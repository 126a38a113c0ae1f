"""The product of float8 codes on a GPU's matrix units equals the reference, and refuses what it cannot do."""

from __future__ import annotations

import pytest
import torch

from qhub.kernels import Problem, dispatch, reference, scaled_mm
from qhub.layouts import Activation, Float8, Grid

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no GPU with 8-bit floats"
)

ROW = Activation(kind="float8")
TENSOR = Activation(kind="float8", granularity="tensor")
STATIC = Activation(kind="float8", granularity="tensor", static=True)
BOUNDED = Activation(kind="float8", limit=2.0)
# Output in bf16 (2^-9) or fp16 (2^-12) after sums of which the matrix unit keeps some 14 bits.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def made(activation, rows, n=96, k=160, codes="e4m3fn"):
    """Return a layout on random numbers: ``rows`` of the weight share a scale."""
    layout = Float8(out_features=n, in_features=k, format=codes, grid=Grid("block", rows, k), activation=activation)
    generator = torch.Generator().manual_seed(0)
    parts = {
        "qweight": torch.randn(n, k, generator=generator).to(layout.dtype),
        "scales": torch.rand(layout.scale_shape, generator=generator) * 0.01 + 1e-3,
    }
    if activation.static:
        parts["input_scale"] = torch.tensor(0.01)
    return layout, {name: part.cuda() for name, part in parts.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [ROW, TENSOR, STATIC, BOUNDED], ids=["row", "tensor", "static", "bounded"])
@pytest.mark.parametrize("rows", [96, 48, 1], ids=["tensor", "halves", "rows"])
@pytest.mark.parametrize("codes", ["e4m3fn", "e5m2"])
def test_it_equals_the_reference(dtype, activation, rows, codes):
    layout, parts = made(activation, rows, codes=codes)
    for m in (1, 3, 16, 33):
        x = torch.randn(m, 160, generator=torch.Generator().manual_seed(m)).to("cuda", dtype)
        bias = torch.randn(96, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        found = scaled_mm.linear(x, layout, parts, bias)
        expected = reference.linear(x, layout, parts, bias).double()
        assert found.dtype == dtype and found.shape == (m, 96)
        assert float((found.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


def test_zeros_give_zeros():
    layout, parts = made(ROW, 1)
    assert not bool(scaled_mm.linear(torch.zeros(2, 160, device="cuda", dtype=torch.bfloat16), layout, parts).any())


def test_the_dispatcher_admits_it(monkeypatch):
    layout, parts = made(ROW, 1)
    choice = dispatch.choose(layout, parts, torch.bfloat16)
    # Whether it is taken is a matter of time.
    assert all("scaled-mm" in {timing.name for timing in timings} for timings in choice.times.values()), choice.refused
    monkeypatch.setenv("QHUB_KERNEL", "scaled-mm")
    choice = dispatch.choose(layout, parts, torch.bfloat16)
    assert choice.name(1) == choice.name(100) == "scaled-mm"


@pytest.mark.parametrize(
    ("activation", "grid", "shape", "reason"),
    [
        (Activation(), Grid("block", 96, 160), (96, 160), "inputs rounded to float8"),
        (Activation(kind="float8", granularity="group", group=32), Grid("block", 32, 32), (96, 160), "of a row"),
        (ROW, Grid("block", 32, 32), (96, 160), "blocks along K"),
        (ROW, Grid("block", 90, 160), (90, 160), "N to be a multiple of 16"),
        (ROW, Grid("block", 96, 150), (96, 150), "K to be a multiple of 16"),
    ],
)
def test_it_refuses_with_a_reason(activation, grid, shape, reason):
    layout = Float8(out_features=shape[0], in_features=shape[1], grid=grid, activation=activation)
    assert reason in (scaled_mm.SPEC.refusal(Problem(layout, "cuda", torch.bfloat16)) or "")
