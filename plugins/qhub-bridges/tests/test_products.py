"""Every library's product equals ``x @ W.T`` of the layout's own weight in float64: so its packing is what we think."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from qhub.errors import KernelError
from qhub.kernels import Problem, dispatch
from qhub.layouts import Activation, Affine, Grid, Lookup, Nested
from qhub.layouts.packing import pack
from qhub.layouts.tiled import Tiled

# Rounding x, the terms and the output once each to 16 bits; a sum of K products of independent roundings adds nothing.
BOUND = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 1e-5}
NF4 = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip
FP4 = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]


def affine(device, n=128, k=256, bits=4, group=64, zero="constant", zero_point=8.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layout = Affine(
        out_features=n, in_features=k, bits=bits, grid=Grid.along_k(group), zero=zero, zero_point=zero_point
    )
    shape = layout.scale_shape
    parts = {"qweight": pack(torch.randint(0, 2**bits, (n, k), generator=generator), bits)}
    parts["scales"] = torch.rand(shape, generator=generator) * 0.1 + 0.01
    if zero == "value":
        parts["zeros"] = torch.randint(0, 2**bits, shape, generator=generator).float()
    elif zero == "offset":
        parts["zeros"] = torch.randn(shape, generator=generator) * 0.1
    return layout, {name: part.to(device) for name, part in parts.items()}


def lookup(device, table, n=96, k=256, group=64, nested=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = Nested(dtype="uint8", group=256, table=True, offset=True) if nested else None
    layout = Lookup(out_features=n, in_features=k, bits=4, grid=Grid.along_k(group), scales_nested=scales)
    parts = {"qweight": pack(torch.randint(0, 16, (n, k), generator=generator), 4), "table": torch.tensor(table)}
    shape = layout.scale_shape
    if nested:
        count = shape[0] * shape[1]
        parts["scales"] = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        parts["scales_super"] = torch.rand(-(-count // 256), generator=generator)
        parts["scales_table"] = torch.linspace(-1, 1, 256)
        parts["scales_offset"] = torch.tensor(1.5)
    else:
        parts["scales"] = torch.rand(shape, generator=generator) + 0.5
    return layout, {name: part.to(device) for name, part in parts.items()}


def fp4_table():
    positive = [value / 12.0 for value in FP4]
    return positive + [0.0 - value for value in positive]


def installed(name):
    library = name.partition("-")[0]
    library = {"marlin": "gptqmodel", "machete": "gptqmodel"}.get(library, library)
    if library != "tinygemm" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def check(monkeypatch, name, layout, parts, dtype, rows=(1, 2, 5, 17, 40)):
    installed(name)
    spec = dispatch.kernels()[name]
    device = next(iter(parts.values())).device
    reason = spec.refusal(Problem(layout, device.type, dtype))
    if reason is not None and any(word in reason for word in ("runs on", "not compiled", "could not load", "a GPU")):
        pytest.skip(reason)
    monkeypatch.setenv("QHUB_KERNEL", name)
    choice = dispatch.choose(layout, parts, dtype)
    weight = layout.dequantize(parts, torch.float64)
    for m in rows:
        assert choice.name(m) == name
        generator = torch.Generator().manual_seed(m)
        x = torch.randn(m, layout.in_features, generator=generator).to(device, dtype)
        bias = torch.randn(layout.out_features, generator=generator).to(device, dtype)
        for b in (None, bias):
            found = choice.pick(m)(x, layout, parts, b)
            wanted = x.double() @ weight.t() + (0 if b is None else b.double())
            assert found.dtype == dtype and found.shape == wanted.shape
            assert float((found.double() - wanted).norm() / wanted.norm()) < BOUND[dtype]


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("tiled", [False, True], ids=["plain", "tiled"])
@pytest.mark.parametrize("name", ["tinygemm", "marlin", "machete"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("zero", "zero_point"), [("constant", 8.0), ("constant", 7.5), ("value", 0.0), ("offset", 8.0), ("offset", 0.0)]
)
def test_affine(monkeypatch, device, name, dtype, zero, zero_point, tiled):
    if name in ("marlin", "machete") and (zero, zero_point) != ("constant", 8.0):
        pytest.skip("symmetric codes only")
    if name == "tinygemm" and device.type == "cuda" and dtype != torch.bfloat16:
        pytest.skip("bfloat16 only on a GPU")
    layout, parts = affine(device, zero=zero, zero_point=zero_point)
    if tiled:
        layout, parts = Tiled.arrange(layout, parts)
        name += "-tiled"
    check(monkeypatch, name, layout, parts, dtype)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize(("n", "k"), [(16, 256), (272, 512)])
def test_tinygemm_sizes(monkeypatch, device, group, n, k):
    check(monkeypatch, "tinygemm", *affine(device, n, k, group=group), torch.bfloat16)


@pytest.mark.parametrize("tiled", [False, True], ids=["plain", "tiled"])
@pytest.mark.parametrize(("zero", "zero_point"), [("constant", 8.0), ("value", 0.0), ("offset", 8.0)])
def test_gemlite(monkeypatch, device, zero, zero_point, tiled):
    # A size and numbers of rows that it brings configurations for: it tunes itself for others, seconds to minutes each.
    layout, parts = affine(device, 4096, 4096, group=128, zero=zero, zero_point=zero_point)
    if tiled:
        layout, parts = Tiled.arrange(layout, parts)
    check(monkeypatch, "gemlite" + ("-tiled" if tiled else ""), layout, parts, torch.bfloat16, rows=(1, 8, 16, 128))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gemlite_widths(monkeypatch, device, bits):
    layout, parts = affine(device, 256, 512, bits=bits, group=128, zero="value", zero_point=0.0)
    check(monkeypatch, "gemlite", layout, parts, torch.float16, rows=(1, 17))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (4, 512), (8, 128), (8, 512)])
def test_marlin_widths(monkeypatch, device, bits, group):
    layout, parts = affine(device, 256, 512, bits=bits, group=group, zero_point=2.0 ** (bits - 1))
    check(monkeypatch, "marlin", layout, parts, torch.float16)


@pytest.mark.parametrize("tiled", [False, True], ids=["plain", "tiled"])
@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_4bit(monkeypatch, device, dtype, table, nested, tiled):
    layout, parts = lookup(device, NF4 if table == "nf4" else fp4_table(), nested=nested)
    if tiled:
        layout, parts = Tiled.arrange(layout, parts)
    check(monkeypatch, "bitsandbytes-4bit" + ("-tiled" if tiled else ""), layout, parts, dtype)


def test_bitsandbytes_takes_no_other_table(monkeypatch, device):
    installed("bitsandbytes")
    monkeypatch.setenv("QHUB_KERNEL", "bitsandbytes-4bit")
    layout, parts = lookup(device, [value + 0.01 for value in NF4])
    with pytest.raises(KernelError, match="tables of NF4 and FP4"):
        dispatch.choose(layout, parts, torch.float16)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_bitsandbytes_int8(monkeypatch, device, dtype, threshold):
    installed("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    n, k = 96, 256
    layout = Affine(
        out_features=n, in_features=k, bits=8, signed=True, grid=Grid("block", 1, k), unit=1 / 127,
        activation=Activation("int8", threshold=threshold),
    )  # fmt: skip
    parts = {
        "qweight": torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8).to(device),
        "scales": (torch.rand(n, 1, generator=generator) + 0.5).to(device),
    }
    monkeypatch.setenv("QHUB_KERNEL", "bitsandbytes-int8")
    choice = dispatch.choose(layout, parts, dtype)
    from qhub.kernels import reference

    for m in (1, 4, 33):
        x = torch.randn(m, k, generator=generator)
        # Both keep these columns unrounded, if there is a threshold.
        x[0, 3], x[-1, 100] = 9.0, -20.0
        x = x.to(device, dtype)
        wanted = reference.linear(x, layout, parts).double()
        found = choice.pick(m)(x, layout, parts, None)
        # Inputs are halves in both: equal but for the rounding of sums and of the output.
        assert float((found.double() - wanted).norm() / wanted.norm()) < 2.0**-7


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("tinygemm", {"group": 16}, "groups of 32/64/128/256"),
        ("tinygemm", {"n": 120}, "multiple of"),
        ("tinygemm", {"bits": 3}, "bits"),
        ("marlin", {"zero": "value"}, "runs on cuda|without zeros"),
        ("machete", {"group": 32}, "runs on cuda|groups of"),
    ],
)
def test_refused_with_a_reason(name, change, reason, device):
    import re

    layout, _ = affine(device, **change)
    said = dispatch.kernels()[name].refusal(Problem(layout, "cpu", torch.bfloat16)) or ""
    assert re.search(reason, said), said


@pytest.mark.parametrize(
    ("zero", "zero_point"), [("constant", 8.0), ("constant", 7.5), ("value", 0.0), ("offset", 8.0), ("offset", 0.0)]
)
def test_terms_are_the_weight(device, zero, zero_point):
    from qhub_bridges.terms import terms

    layout, parts = affine(device, zero=zero, zero_point=zero_point)
    for held in ((layout, parts), Tiled.arrange(layout, parts)):
        q, scale, shift = terms(*held)
        found = q.double() * scale.double().repeat_interleave(64, 1) + shift.double().repeat_interleave(64, 1)
        assert torch.allclose(found, layout.dequantize(parts, torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_gptq(bits):
    from qhub_bridges.extension import words_along_k

    q = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(0))
    words = words_along_k(q.to(torch.uint8), bits).to(torch.int64) & 0xFFFFFFFF
    for row in range(3):
        for column in range(64):
            word = int(words[column * bits // 32, row])
            assert word >> (column * bits % 32) & (2**bits - 1) == int(q[row, column])


def test_a_second_copy_is_made_only_for_who_asks(device):
    layout, parts = affine(device)
    choice = dispatch.choose(layout, parts, torch.bfloat16)
    assert "second copy" in choice.refused["tinygemm"] and choice.name(1) != "tinygemm"


def test_written_weights_are_packed_anew(monkeypatch, device):
    from qhub.tensor import QuantizedTensor

    monkeypatch.setenv("QHUB_KERNEL", "tinygemm")
    layout, parts = affine(device)
    weight = QuantizedTensor.build(layout, parts, torch.bfloat16)
    x = torch.randn(2, 256, device=device, dtype=torch.bfloat16)
    before = torch.nn.functional.linear(x, weight)
    with torch.no_grad():
        weight.copy_(torch.randn(128, 256, device=device))
    after = torch.nn.functional.linear(x, weight)
    wanted = x.double() @ weight.dequantize(torch.float64).t()
    assert not torch.allclose(before, after)
    assert float((after.double() - wanted).norm() / wanted.norm()) < BOUND[torch.bfloat16]
