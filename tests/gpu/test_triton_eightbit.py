"""Products with inputs in 8 bits on a GPU: every scheme and way against the CPU, in graphs, without waiting."""

from __future__ import annotations

import pytest
import torch

from qhub.kernels import Problem, dispatch, reference
from qhub.layouts import Activation, Affine, Float8, Grid

pytest.importorskip("qhub_triton")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no GPU with 8-bit floats"
)

# One rounding of the output (2^-9 and 2^-12 of many values), and sums of which the matrix unit keeps some 14 bits.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# One size that every kernel likes, and one that is a multiple of nothing.
SIZES = [(torch.bfloat16, 256, 512), (torch.float16, 333, 250)]
FLOATS = {
    "row": Activation(kind="float8"),
    "tensor": Activation(kind="float8", granularity="tensor"),
    "static": Activation(kind="float8", granularity="tensor", static=True),
    "bounded": Activation(kind="float8", limit=2.0),
    "powers": Activation(kind="float8", scale_format="ue8m0", top=224.0),
    "group": Activation(kind="float8", granularity="group", group=128),
    "mx": Activation(kind="float8", granularity="group", group=32, scale_format="e8m0fnu"),
}
INTEGERS = {
    "row": Activation("int8"),
    "outliers": Activation("int8", threshold=3.0),
    "half": Activation("int8", top=127.5),
    "tensor": Activation("int8", granularity="tensor"),
    "group": Activation("int8", granularity="group", group=128),
}


def float_weight(activation, n, k, rows=1, cols=None, codes="e4m3fn"):
    layout = Float8(
        out_features=n, in_features=k, format=codes, grid=Grid("block", rows, cols or k), activation=activation
    )
    generator = torch.Generator().manual_seed(0)
    parts = {
        "qweight": torch.randn(n, k, generator=generator).to(layout.dtype),
        "scales": torch.rand(layout.scale_shape, generator=generator) * 0.01 + 1e-3,
    }
    if activation.static:
        parts["input_scale"] = torch.tensor(0.01)
    return layout, parts


def integer_weight(activation, n, k):
    layout = Affine(
        out_features=n,
        in_features=k,
        bits=8,
        signed=True,
        grid=Grid("block", 1, k),
        unit=1 / 127,
        activation=activation,
    )
    generator = torch.Generator().manual_seed(0)
    return layout, {
        "qweight": torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8),
        "scales": torch.rand(layout.scale_shape, generator=generator) + 0.1,
    }


def bound(layout, parts, dtype, config=None):
    from qhub_triton.eightbit.linear import bind

    return bind(layout, {name: part.cuda() for name, part in parts.items()}, dtype, config)


def check(layout, parts, dtype, rows=(1, 3, 33, 300), config=None, biased=False):
    run = bound(layout, parts, dtype, config)
    for m in rows:
        x = torch.randn(m, layout.in_features, generator=torch.Generator().manual_seed(m)).to(dtype)
        bias = (
            torch.randn(layout.out_features, generator=torch.Generator().manual_seed(1)).to(dtype) if biased else None
        )
        expected = reference.linear(x, layout, parts, bias).double()
        found = run(x.cuda(), None if bias is None else bias.cuda())
        assert found.dtype == dtype and found.shape == expected.shape
        error = float((found.cpu().double() - expected).norm() / expected.norm())
        assert error < TOLERANCE[dtype], (m, error)


@pytest.mark.parametrize(("dtype", "n", "k"), SIZES)
@pytest.mark.parametrize("name", FLOATS)
def test_float8_equals_the_reference(name, dtype, n, k):
    check(*float_weight(FLOATS[name], n, k), dtype, biased=True)


@pytest.mark.parametrize(("dtype", "n", "k"), SIZES)
@pytest.mark.parametrize("name", INTEGERS)
def test_int8_equals_the_reference(name, dtype, n, k):
    check(*integer_weight(INTEGERS[name], n, k), dtype, biased=True)


@pytest.mark.parametrize(("rows", "cols"), [(256, 512), (128, 128), (1, 128), (1, 32)])
@pytest.mark.parametrize("name", ["row", "group", "static"])
def test_scales_of_the_weight_may_lie_in_blocks(rows, cols, name):
    check(*float_weight(FLOATS[name], 256, 512, rows, cols), torch.bfloat16, rows=(1, 5, 70, 131))


def test_mixed_formats():
    check(*float_weight(FLOATS["row"], 256, 512, codes="e5m2"), torch.bfloat16)


@pytest.mark.parametrize("m", [1, 16, 128, 512])
@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_each_tunable_choice_is_right(kind, m):
    from qhub_triton.eightbit.choosing import tunables

    make, schemes = (float_weight, FLOATS) if kind == "float8" else (integer_weight, INTEGERS)
    layout, parts = make(schemes["row"], 512, 1024)
    on_gpu = {name: part.cuda() for name, part in parts.items()}
    for config in tunables(Problem(layout, "cuda", torch.bfloat16), on_gpu, m).values():
        check(layout, parts, torch.bfloat16, (m,), config)


@pytest.mark.parametrize("m", [1, 5, 64, 300])
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_it_runs_in_a_graph_and_gives_the_same_each_time(m, threshold):
    run = bound(*integer_weight(Activation("int8", threshold=threshold), 4096, 1024), torch.bfloat16)
    x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
    first = run(x, None)
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        y = run(x, None)
    for _ in range(20):
        graph.replay()
        assert torch.equal(first, y)
    x.mul_(0.5)
    graph.replay()
    assert torch.equal(run(x, None), y)


def test_it_never_waits_for_the_gpu():
    layout, parts = integer_weight(INTEGERS["outliers"], 256, 512)
    for run in (bound(layout, parts, torch.bfloat16), bound(*float_weight(FLOATS["tensor"], 256, 512), torch.bfloat16)):
        for m in (1, 7, 300):
            x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
            run(x, None)
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(x, None)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_slice_that_starts_anywhere():
    layout, parts = float_weight(FLOATS["row"], 256, 512)
    run = bound(layout, parts, torch.bfloat16)
    flat = torch.randn(5 * 512 + 1, device="cuda", dtype=torch.bfloat16)
    for m in (1, 5):
        odd = flat[1 : 1 + m * 512].view(m, 512)
        assert torch.equal(run(odd, None), run(odd.clone(), None))


def test_what_is_no_number_is_not_hidden():
    for weight in (float_weight(FLOATS["row"], 256, 512), integer_weight(INTEGERS["row"], 256, 512)):
        run = bound(*weight, torch.bfloat16)
        for m in (1, 40, 400):
            x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
            x[0, 3] = float("nan")
            y = run(x, None)
            assert bool(y[0].isnan().all()) and not bool(y[1:].isnan().any())


def test_zeros_give_zeros():
    run = bound(*float_weight(FLOATS["row"], 256, 512), torch.bfloat16)
    for m in (1, 2, 300):
        assert not bool(run(torch.zeros(m, 512, device="cuda", dtype=torch.bfloat16), None).any())


@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_the_dispatcher_admits_it(kind):
    layout, parts = (
        float_weight(FLOATS["row"], 256, 512) if kind == "float8" else integer_weight(INTEGERS["row"], 256, 512)
    )
    choice = dispatch.choose(layout, {name: part.cuda() for name, part in parts.items()}, torch.bfloat16)
    assert f"triton-{kind}" not in choice.refused, choice.refused
