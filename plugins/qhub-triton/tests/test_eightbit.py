"""Products with inputs in 8 bits, in triton's interpreter: every scheme against the reference, odd sizes, refusals."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch

from qhub.kernels import Problem, reference
from qhub.layouts import Activation, Affine, Float8, Grid

pytest.importorskip("triton")

from qhub_triton.eightbit import accepting, choosing, library, offers
from qhub_triton.eightbit.launching import Row, Tile
from qhub_triton.eightbit.linear import bind, linear

CODES = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


@pytest.fixture(autouse=True)
def numbers_of_a_gpu(monkeypatch):
    """Compute as GPUs do: the interpreter of triton 3.6 loses the carry of an 8-bit float's rounded mantissa, and
    subnormals, and rounds the product in a fused multiply-add."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(value, source, target, rounding=None):
        to, of = CODES.get(str(target)), CODES.get(str(source))
        if to is not None and str(source) == "fp32":
            codes = torch.from_numpy(np.ascontiguousarray(value).view(np.float32)).to(to)
            return codes.view(torch.uint8).numpy().reshape(value.shape)
        if of is not None and str(target) in ("fp32", "fp16"):
            floats = torch.from_numpy(np.ascontiguousarray(value).view(np.uint8)).view(of).float().numpy()
            wide = floats.view(np.uint32) if str(target) == "fp32" else floats.astype(np.float16).view(np.uint16)
            return wide.reshape(value.shape)
        return convert(value, source, target, rounding)

    def fused(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has tests of its own")

# fp16 output: half an ulp, 2^-11 of a value and 2^-12 of many.
TOLERANCE = 2.0**-11

FLOATS = {
    "row": Activation(kind="float8"),
    "tensor": Activation(kind="float8", granularity="tensor"),
    "static": Activation(kind="float8", granularity="tensor", static=True),
    "bounded": Activation(kind="float8", limit=2.0),
    "e5m2": Activation(kind="float8", format="e5m2"),
    "powers": Activation(kind="float8", scale_format="ue8m0", top=224.0),
    "group": Activation(kind="float8", granularity="group", group=32),
    "mx": Activation(kind="float8", granularity="group", group=32, scale_format="e8m0fnu"),
    "even": Activation(kind="float8", granularity="group", group=32, scale_format="e8m0even"),
}
INTEGERS = {
    "row": Activation("int8"),
    "outliers": Activation("int8", threshold=3.0),
    "half": Activation("int8", top=127.5),
    "seven": Activation("int8", bits=7, top=63.5),
    "tensor": Activation("int8", granularity="tensor"),
    "static": Activation("int8", granularity="tensor", static=True),
    "group": Activation("int8", granularity="group", group=32),
}
SMALL = {"kind": "tile", "bn": 32, "bm": 16, "bk": 32, "split": 1, "stages": 2, "warps": 4}
SPLIT = {**SMALL, "split": 2}
ROW = {"kind": "row", "bn": 8, "bk": 64, "warps": 4, "fold": 8}


def float_weight(activation, rows=1, cols=None, n=40, k=96, codes="e4m3fn", scales=torch.float32):
    grid = Grid("block", rows, cols or k)
    layout = Float8(out_features=n, in_features=k, format=codes, grid=grid, activation=activation)
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(layout.scale_shape, generator=generator) * 0.01 + 1e-3
    parts = {"qweight": torch.randn(n, k, generator=generator).to(layout.dtype), "scales": values.to(scales)}
    if activation.static:
        parts["input_scale"] = torch.tensor(0.01)
    return layout, parts


def integer_weight(activation, n=40, k=96):
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
    parts = {
        "qweight": torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8),
        "scales": torch.rand(layout.scale_shape, generator=generator) + 0.1,
    }
    if activation.static:
        parts["input_scale"] = torch.tensor(0.02)
    return layout, parts


def inputs(m, k):
    return (torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * 1.5).half()


def agrees(layout, parts, config, m, bias=None):
    x = inputs(m, layout.in_features)
    found = linear(x, layout, parts, bias, config)
    expected = reference.linear(x, layout, parts, bias).double()
    assert found.shape == expected.shape and found.dtype == torch.float16
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < TOLERANCE, error


@pytest.mark.parametrize("name", FLOATS)
def test_float8_equals_the_reference(name):
    layout, parts = float_weight(FLOATS[name])
    agrees(layout, parts, SMALL, 3)
    agrees(layout, parts, ROW, 1)


@pytest.mark.parametrize("name", INTEGERS)
def test_int8_equals_the_reference(name):
    layout, parts = integer_weight(INTEGERS[name])
    agrees(layout, parts, SPLIT, 3)
    agrees(layout, parts, ROW, 1)


@pytest.mark.parametrize(
    ("rows", "cols", "scales"),
    [(40, 96, torch.float32), (16, 32, torch.float32), (1, 32, torch.float8_e8m0fnu)],
)
def test_scales_of_the_weight_may_lie_in_blocks(rows, cols, scales):
    for activation in (FLOATS["row"], FLOATS["group"]):
        layout, parts = float_weight(activation, rows, cols, scales=scales)
        agrees(layout, parts, SPLIT, 3)
        agrees(layout, parts, ROW, 1)


@pytest.mark.parametrize(("n", "k", "m"), [(37, 70, 5), (1, 33, 1), (65, 96, 17), (37, 70, 1)])
def test_any_size_goes(n, k, m):
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).half()
    for layout, parts in (float_weight(FLOATS["row"], n=n, k=k), integer_weight(INTEGERS["outliers"], n, k)):
        agrees(layout, parts, SPLIT, m, bias)
        if m == 1:
            agrees(layout, parts, ROW, 1, bias)


def test_mixed_formats():
    layout, parts = float_weight(FLOATS["row"], codes="e5m2")
    agrees(layout, parts, SMALL, 2)


def test_split_sums_are_the_same_each_time_and_zeros_stay_zeros():
    layout, parts = float_weight(FLOATS["row"])
    run = bind(layout, parts, torch.float16, SPLIT)
    assert torch.equal(run(inputs(3, 96)), run(inputs(3, 96)))
    assert not bool(run(torch.zeros(2, 96, dtype=torch.float16)).any())


@pytest.mark.parametrize("config", [SMALL, ROW], ids=["tile", "row"])
def test_what_is_no_number_is_not_hidden(config):
    for layout, parts in (float_weight(FLOATS["row"]), integer_weight(INTEGERS["row"])):
        x = inputs(1, 96)
        x[0, 3] = float("nan")
        assert bool(linear(x, layout, parts, None, config).isnan().all())


def test_an_outlier_leaves_the_codes_of_its_column_alone():
    layout, parts = integer_weight(Activation("int8", threshold=6.0))
    x = inputs(3, 96).clamp(-4, 4)
    x[1, 7], x[2, 90] = 60.0, -50.0
    for rows in (x, x[1:2], x[:1]):
        config = ROW if len(rows) == 1 else SPLIT
        found = linear(rows.contiguous(), layout, parts, None, config).double()
        expected = reference.linear(rows, layout, parts).double()
        assert float((found - expected).norm() / expected.norm()) < 2.0**-10


def test_many_rows_share_the_marks_of_a_column():
    layout, parts = integer_weight(INTEGERS["outliers"], n=16, k=64)
    agrees(layout, parts, {**SMALL, "bm": 64, "bk": 64}, 300)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": Activation()}, "inputs rounded to float8"),
        ({"format": "e4m3fnuz"}, "not e4m3fnuz"),
        ({"grid": Grid("flat", 1, 64)}, "not flat ones"),
        ({"activation": Activation(kind="float8", granularity="group", group=48)}, "not 48"),
        ({"activation": Activation(kind="float8", granularity="group", group=16, scale_format="e4m3fn")}, "not E4M3"),
        ({"grid": Grid("block", 1, 48)}, "here it is 48"),
    ],
)
def test_float8_refuses_with_a_reason(change, reason):
    layout = dataclasses.replace(float_weight(FLOATS["row"])[0], **change)
    assert reason in (accepting.float8(Problem(layout, "cpu", torch.float16)) or "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": Activation("int8", symmetric=False)}, "symmetric"),
        ({"zero": "value"}, "without a zero"),
        ({"activation": Activation(kind="float8")}, "rounded to int8"),
        ({"math": "scales"}, "in float32"),
        ({"grid": Grid("block", 1, 32), "activation": Activation("int8", threshold=6.0)}, "columns with outliers"),
    ],
)
def test_int8_refuses_with_a_reason(change, reason):
    layout = dataclasses.replace(integer_weight(INTEGERS["row"])[0], **change)
    assert reason in (accepting.int8(Problem(layout, "cpu", torch.float16)) or "")


def test_the_choices_fit_the_layout():
    layout, parts = float_weight(FLOATS["group"], 16, 32)
    setting = choosing.Setting.of(layout, parts, torch.float16, True)
    for m in (1, 2, 16, 64, 1024):
        chosen = choosing.fitted(choosing.choice(setting, m), setting, m)
        if isinstance(chosen, Tile):
            assert chosen.bk == 32 and not chosen.pdl
        else:
            assert isinstance(chosen, Row) and m == 1
        for config in choosing.tunables(Problem(layout, "cpu", torch.float16), parts, m).values():
            assert choosing.fitted(choosing.choice_of(config), setting, m) == choosing.choice_of(config)


def scaled_mm(codes, weight, rows, own, bias=None, out_dtype=None, use_fast_accum=None):
    """Multiply as cuBLAS does, and insist on the order of scales in memory that it documents."""
    (m, k), n = codes.shape, weight.shape[1]
    assert weight.stride() == (1, k) and codes.is_contiguous()
    if rows.shape != (m, 1):
        assert rows.shape == (m, k // 128) and rows.stride() == (1, m) and k % 512 == 0 and m % 4 == 0
        assert own.shape == (k // 128, -(-n // 128)) and own.stride() == (1, k // 128) and not use_fast_accum
        rows = rows.repeat_interleave(128, 1)
        own = own.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :n]
    else:
        assert own.shape == (1, n) and own.is_contiguous()
    y = (codes.float() * rows) @ (weight.float() * own)
    return (y if bias is None else y + bias).to(out_dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("activation", "rows", "cols", "n", "k"),
    [
        (FLOATS["row"], 1, 96, 48, 96),
        (FLOATS["tensor"], 48, 96, 48, 96),
        (FLOATS["static"], 20, 96, 48, 96),
        (Activation(kind="float8", granularity="group", group=128), 128, 128, 144, 512),
    ],
    ids=["row", "tensor", "static", "blocks"],
)
def test_what_cublas_is_given(monkeypatch, activation, rows, cols, n, k, biased):
    layout, parts = float_weight(activation, rows, cols, n, k)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(library, "_tried", {})
    assert library.takes(layout, parts, torch.float16)
    run = library.LibraryProduct(layout, parts, library.Library())
    run.index = -1
    x = inputs(5, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).half() if biased else None
    expected = reference.linear(x, layout, parts, bias).double()
    assert float((run(x, bias).double() - expected).norm() / expected.norm()) < TOLERANCE


def test_cublas_is_not_asked_for_what_it_does_not_take(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(library, "_tried", {})
    group = Activation(kind="float8", granularity="group", group=128)
    for activation, rows, cols, n, k in (
        (FLOATS["row"], 1, 96, 40, 96),
        (FLOATS["row"], 1, 90, 48, 90),
        (FLOATS["row"], 128, 128, 128, 512),
        (group, 1, 128, 128, 512),
        (group, 128, 128, 128, 384),
        (FLOATS["group"], 32, 32, 64, 512),
    ):
        assert not library.takes(*float_weight(activation, rows, cols, n, k), torch.float16)


def test_the_offers_name_functions_that_exist():
    for spec in offers.offers():
        for path in (spec.impl, spec.bind, spec.accepts, spec.tunables):
            assert callable(spec.load(path))
