"""The product with weights in tiles, against float64 on the dequantized weights."""

import pytest
import torch
from qhub_triton.tiled.linear import linear

from qhub.layouts import Affine, Float8, Grid, Lookup, Nested
from qhub.layouts.tiled import Tiled

NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies no bfloat16.
DTYPES = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float16]


def made(layout, seed=0):
    """Return random parts for ``layout``."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, spec in layout.core_specs().items():
        dtype = spec.dtypes[0]
        if name == "qweight" and isinstance(layout, Float8):
            parts[name] = torch.randn(spec.shape, generator=generator).to(dtype)
        elif name == "table":
            parts[name] = torch.tensor(NF4)
        elif name == "scales_table":
            parts[name] = torch.linspace(-1, 1, 256)
        elif name == "zeros" and layout.zero == "value" and seed % 2:
            parts[name] = torch.randint(0, 2**layout.bits, spec.shape, generator=generator).to(torch.uint8)
        elif dtype.is_floating_point:
            parts[name] = torch.rand(spec.shape, generator=generator).to(dtype) + 0.1
        elif dtype == torch.int8:
            parts[name] = torch.randint(-128, 128, spec.shape, generator=generator).to(torch.int8)
        else:
            top = 2 ** getattr(layout, "bits", 8) if name == "qweight" and layout.bits in (3, 5, 6, 7) else 256
            codes = torch.randint(0, top, spec.shape, generator=generator).to(torch.uint8)
            parts[name] = codes
    if isinstance(layout, Affine) and not layout.signed:
        codes = torch.randint(0, 2**layout.bits, (layout.out_features, layout.in_features), generator=generator)
        parts["qweight"] = layout.pack_codes(codes)
    return {name: part.to(DEVICE) for name, part in parts.items()}


def check(layout, m, dtype=DTYPES[0], config=None, seed=0, biased=False, parts=None):
    """Compare the product with float64."""
    parts = parts or made(layout, seed)
    tiled, own = Tiled.arrange(layout, parts)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(m, layout.in_features, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(layout.out_features, generator=generator).to(DEVICE, dtype) if biased else None
    found = linear(x, tiled, own, bias, config)
    weight = layout.dequantize(parts, torch.float32).double()
    wanted = x.double() @ weight.T
    if bias is not None:
        wanted += bias.double()
    assert found.shape == wanted.shape and found.dtype == dtype
    error = float((found.double() - wanted).norm() / wanted.norm())
    # One rounding of the result, one of each weight where it is no whole number.
    limit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert error < limit, (layout, m, error)
    return error


def affine(bits, group=128, n=96, k=512, **more):
    more = {"zero_point": 2.0 ** (bits - 1), **more}
    return Affine(out_features=n, in_features=k, bits=bits, grid=Grid.along_k(group), **more)


FEW = {"kernel": "few", "warps": 2, "tall": 1, "ahead": 2, "block_m": 8}
MANY = {"kernel": "many", "warps": 4, "block_n": 64, "block_m": 16, "split": 1, "stages": 2}
BANKS = {**MANY, "banks": True}


@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_width(bits, config):
    check(affine(bits), 3, config=config)
    check(affine(bits, group=32, zero="value", zero_point=0.0), 3, config=config, seed=1)


@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("zero", ["constant", "value", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_zero(zero, dtype, config):
    for seed in (0, 1):
        check(affine(4, group=64, zero=zero, zero_point=0.0), 2, dtype, config, seed, biased=True)


@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(1, 1, 32), (70, 200, 32), (65, 130, 64), (16, 96, 128), (130, 257, 257)]
)
def test_odd_shapes(n, k, group, config):
    check(affine(4, group=group, n=n, k=k), 5, config=config)
    check(affine(3, group=group, n=n, k=k), 5, config=config)


@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("format", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("grid", [Grid.along_k(512), Grid("block", 128, 128), Grid("block", 96, 512)], ids=str)
def test_float8(format, grid, config):
    layout = Float8(out_features=96, in_features=512, format=format, grid=grid)
    check(layout, 4, config=config)
    check(layout, 4, torch.float16, config=config)


@pytest.mark.parametrize("config", [FEW, MANY, BANKS], ids=["few", "many", "banks"])
@pytest.mark.parametrize("nested", [None, Nested(group=16, table=True, offset=True)], ids=["plain", "nested"])
def test_lookup(nested, config):
    layout = Lookup(out_features=96, in_features=512, grid=Grid.along_k(64), scales_nested=nested)
    check(layout, 4, config=config)


@pytest.mark.parametrize("config", [FEW, MANY, BANKS], ids=["few", "many", "banks"])
def test_scales_that_are_powers_of_two(config):
    layout = Lookup(out_features=96, in_features=512, grid=Grid.along_k(32))
    parts = made(layout)
    parts["scales"] = torch.randint(120, 131, (96, 16), dtype=torch.uint8).to(DEVICE).view(torch.float8_e8m0fnu)
    check(layout, 4, config=config, parts=parts)


@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
def test_signed(config):
    layout = Affine(out_features=80, in_features=320, bits=8, grid=Grid.along_k(320), signed=True, unit=1 / 127)
    check(layout, 4, config=config)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("k", [640, 1024])
def test_parts_of_a_sum_come_out_the_same(split, k):
    # Five blocks in four parts of two are three parts.
    config = {**MANY, "split": split}
    check(affine(4, k=k), 20, config=config)


@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
def test_groups_whose_weights_are_all_the_same(config):
    """A scale of 0 leaves the offset; zeros far from all codes are less by more than 16 bits hold."""
    layout = affine(4, group=64, zero="offset", zero_point=0.0)
    parts = made(layout)
    parts["scales"][::3] = 0.0
    check(layout, 5, config=config, parts=parts)
    layout = affine(4, group=64, zero="value", zero_point=0.0)
    parts = made(layout)
    parts["zeros"][::5] = 300.0
    parts["zeros"][1::5] = -250.7
    check(layout, 5, config=config, parts=parts)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("point", [0, 1, 2.0**-1, None], ids=str)
def test_error_is_that_of_a_dense_product(bits, dtype, stored, point):
    """Scales of any dtype lose nothing but what rounding the weight does."""
    layout = affine(bits, zero_point=2.0 ** (bits - 1) if point is None else point)
    parts = made(layout)
    # Down to where float16 begins to lose digits, of scales as of weights.
    least = -4 if torch.float16 in (dtype, stored) else -9
    spread = torch.linspace(least, 0, parts["scales"].numel(), device=DEVICE).reshape(parts["scales"].shape)
    parts["scales"] = (10.0**spread).to(stored)
    weight = layout.dequantize(parts, torch.float32)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, layout.in_features, generator=generator).to(DEVICE, dtype)
    wanted = x.double() @ weight.double().T
    dense = (x.double() @ weight.to(dtype).double().T).to(dtype).double()
    tiled, own = Tiled.arrange(layout, parts)
    found = linear(x, tiled, own, None, MANY).double()
    # Each output by itself: a large scale of one row must not hide the small one of another.
    usual, error = (float(((one - wanted).norm(dim=0) / wanted.norm(dim=0)).mean()) for one in (dense, found))
    assert error < 1.2 * usual


@pytest.mark.parametrize("block_m", [8, 16, 32])
@pytest.mark.parametrize("tall", [1, 2])
def test_rows_of_input(block_m, tall):
    for m in (1, 9, 33):
        check(affine(4), m, config={**FEW, "block_m": block_m, "tall": tall})
