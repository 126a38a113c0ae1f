"""Products against float64, for every layout, dtype and number of rows; exactness of what is decoded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qhub_cpu.linear import few_rows, many_rows

from qhub.kernels import reference
from qhub.kernels.dispatch import choose
from qhub.layouts import Activation, Affine, Grid, Lookup
from qhub.layouts.packing import pack


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, also where the suite runs with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("m", [1, 2, 3, 7, 8])
def test_few_rows(case, dtype, m, inputs, unit):
    x, bias = inputs(case.layout, m, dtype)
    y = few_rows(x, case.layout, case.parts, bias)
    assert y.dtype == dtype and y.shape == (m, case.layout.out_features)
    exact = x.double() @ case.dense.T + bias.double()
    bound = (
        case.bound(x.double()) + unit[dtype] * exact.abs() * (1 + 2.0**-6) + unit[torch.float32] * bias.double().abs()
    )
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("m", [1, 9, 17, 64])
def test_many_rows(case, dtype, m, inputs, unit):
    x, bias = inputs(case.layout, m, dtype)
    y = many_rows(x, case.layout, case.parts, bias)
    assert y.dtype == dtype and y.shape == (m, case.layout.out_features)
    exact = x.double() @ case.dense.T + bias.double()
    # Weights are rounded to the input's dtype, and so is an input between transforms and product; torch rounds the sum
    # to it before and after the bias, or once.
    rounded = 0.0 if dtype == torch.float32 else unit[dtype] * (2 if case.layout.transforms else 1)
    bound = case.bound(x.double(), rounded)
    bound += 2 * unit[dtype] * (exact.abs() + bias.double().abs() + bound) * (1 + 2.0**-6)
    # float16 keeps absolute steps below its normal numbers.
    bound += 2.0**-24 * x.shape[1] if dtype == torch.float16 else 0.0
    assert ((y.double() - exact).abs() <= bound).all()


def test_without_bias(case, inputs):
    x, bias = inputs(case.layout, 2, torch.float32)
    for run in (few_rows, many_rows):
        difference = run(x, case.layout, case.parts, bias) - run(x, case.layout, case.parts, None) - bias
        assert difference.abs().max() <= 4 * 2.0**-24 * (x.abs() @ case.terms.float().T).max()


def test_decoded_weights_are_exact(case):
    if case.layout.transforms:
        pytest.skip("a transform is a product of its own")
    # A row with a single one picks a column of W: no sum rounds, so what comes out is what was decoded.
    weight = case.layout.decode(case.parts)
    picks = torch.eye(case.layout.in_features)
    assert torch.equal(few_rows(picks, case.layout, case.parts), weight.T)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(many_rows(picks.to(dtype), case.layout, case.parts), weight.to(dtype).T)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_codes_of_every_width_and_length(data):
    bits = data.draw(st.integers(1, 8))
    n, k = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 150))
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=n * k, max_size=n * k))).reshape(n, k)
    layout = Affine(out_features=n, in_features=k, bits=bits, grid=Grid.along_k(k))
    parts = {"qweight": pack(codes, bits), "scales": torch.ones(n, 1)}
    assert torch.equal(few_rows(torch.eye(k), layout, parts), codes.T.float())
    assert torch.equal(many_rows(torch.eye(k), layout, parts), codes.T.float())


@pytest.mark.parametrize(
    ("rows", "name"), [(1, "few"), (8, "few"), (9, "many"), (512, "many")], ids=["1", "8", "9", "512"]
)
def test_which_kernel_runs(case, dtype, rows, name):
    choice = choose(case.layout, case.parts, dtype)
    assert choice.name(rows) == f"cpu-{case.layout.kind}-{name}"


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Lookup(out_features=33, in_features=100, grid=Grid("flat", 1, 64)), "groups along K, not flat ones"),
        (
            Affine(out_features=32, in_features=64, bits=4, grid=Grid("strided", 1, 64)),
            "groups along K, not strided ones",
        ),
        (Affine(out_features=32, in_features=64, bits=4, grid=Grid.along_k(8)), "multiple of 16 weights, not 8"),
        (Lookup(out_features=32, in_features=64, bits=8, grid=Grid.along_k(64)), "bits"),
        (
            Affine(out_features=32, in_features=64, bits=4, grid=Grid.along_k(64), activation=Activation("float8")),
            "activations",
        ),
    ],
)
def test_what_is_refused(layout, reason):
    parts = {name: torch.zeros(spec.shape, dtype=spec.dtypes[0]) for name, spec in layout.part_specs().items()}
    choice = choose(layout, parts, torch.float32)
    assert choice.name(1) == "reference"
    assert reason in choice.refused[f"cpu-{layout.kind}-few"]


def test_experts_of_a_batch(make, inputs):
    cases = [make["lookup"](nested="table"), make["lookup"](nested="table")]
    layout = cases[0].layout
    cases[1].parts["qweight"] = cases[1].parts["qweight"].flip(0)
    stacked = {
        name: torch.stack([one.parts[name] for one in cases]) if spec.batched else cases[0].parts[name]
        for name, spec in layout.part_specs().items()
    }
    x, bias = inputs(layout, 3, torch.float32)
    for index, one in enumerate(cases):
        parts = {
            name: stacked[name][index] if spec.batched else stacked[name] for name, spec in layout.part_specs().items()
        }
        assert torch.equal(few_rows(x, layout, parts, bias), few_rows(x, layout, one.parts, bias))


def test_parts_with_gaps(case, inputs):
    x, bias = inputs(case.layout, 3, torch.float32)
    loose = {name: torch.stack([part, part], -1)[..., 0] for name, part in case.parts.items()}
    assert not loose["qweight"].is_contiguous()
    for run in (few_rows, many_rows):
        assert torch.equal(run(x, case.layout, loose, bias), run(x, case.layout, case.parts, bias))


def test_one_layout_with_scales_of_several_dtypes(make, inputs):
    wide = make["affine"](4)
    x, _ = inputs(wide.layout, 1, torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        parts = {name: part if name == "qweight" else part.to(dtype) for name, part in wide.parts.items()}
        expected = reference.linear(x, wide.layout, parts)
        # One part in 2^16: far below what scales read as another dtype would give.
        assert (few_rows(x, wide.layout, parts) - expected).norm() <= 2.0**-16 * expected.norm()


def test_any_number_of_threads_gives_the_same_bits(make, two_threads):
    # Large enough for two threads, and for more panels than one.
    case = make["lookup"](n=1031, k=2048, nested="table")
    for m, run in ((1, few_rows), (5, few_rows), (20, many_rows)):
        x = torch.randn(m, 2048, generator=torch.Generator().manual_seed(m))
        results = [run(x, case.layout, case.parts) for _ in range(5)]
        torch.set_num_threads(1)
        results += [run(x, case.layout, case.parts)] if run is few_rows else []
        torch.set_num_threads(2)
        assert all(torch.equal(one, results[0]) for one in results[1:])
        exact = x.double() @ case.dense.T
        assert ((results[0].double() - exact).abs() <= case.bound(x.double())).all()


def test_panels_do_not_change_the_product(make, inputs, monkeypatch):
    case = make["affine"](4)
    x, bias = inputs(case.layout, 12, torch.float32)
    whole = many_rows(x, case.layout, case.parts, bias)
    monkeypatch.setattr("qhub_cpu.linear._PANEL", 7 * 192 * 4)
    parted = many_rows(x, case.layout, case.parts, bias)
    assert (whole - parted).abs().max() <= 2 * case.bound(x.double()).max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(make, inputs, dtype, value):
    case = make["lookup"]()
    x, _ = inputs(case.layout, 2, dtype)
    x[0, 5] = value
    y = few_rows(x, case.layout, case.parts)
    expected = reference.linear(x, case.layout, case.parts)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isnan(), expected.isnan())
