"""The dequantizing kernel writes what the layout says, bit for bit, for every way of storing numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from qhub.layouts import Affine, Float8, Grid, Lookup, Nested, Stacked, Transform
from qhub.layouts.packing import pack
from qhub.layouts.tiled import Tiled

dense = pytest.importorskip("qhub_triton.dense.dequantize")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU each is a kernel to compile; tests/gpu has them all, for some layouts.
DTYPES = (torch.bfloat16,) if DEVICE == "cuda" else (torch.float32, torch.bfloat16, torch.float16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def filled(layout, seed=0, scale=torch.float32, zero=torch.float32):
    """Return parts of random codes under random scales."""
    generator = seeded(seed)
    specs = layout.core_specs()
    for transform in layout.transforms:
        specs.update(transform.part_specs(layout))
    wanted = {"scales": scale, "zeros": zero}
    parts = {}
    for name, spec in specs.items():
        dtype = wanted[name] if wanted.get(name) in spec.dtypes else spec.dtypes[0]
        if name == "qweight" and dtype is torch.uint8:
            q = torch.randint(0, 2**layout.bits, (layout.out_features, layout.in_features), generator=generator)
            parts[name] = pack(q, layout.bits)
        elif name == "in_perm":
            parts[name] = torch.randperm(layout.in_features, generator=generator).to(torch.int32)
        elif dtype in (torch.uint8, torch.int8):
            info = torch.iinfo(dtype)
            parts[name] = torch.randint(info.min, info.max + 1, spec.shape, generator=generator).to(dtype)
        elif dtype is torch.float8_e8m0fnu:
            parts[name] = torch.randint(120, 132, spec.shape, generator=generator).to(torch.uint8).view(dtype)
        elif dtype.itemsize == 1:
            codes = torch.randint(0, 256, spec.shape, generator=generator).to(torch.uint8)
            if name == "scales":
                codes &= 0x7F
            codes[~torch.isfinite(codes.view(dtype).float())] = 1
            parts[name] = codes.view(dtype)
        else:
            parts[name] = (torch.rand(spec.shape, generator=generator) + 0.25).to(dtype)
    return {name: part.to(DEVICE) for name, part in parts.items()}


def same(layout, parts, dtypes=DTYPES):
    for dtype in dtypes:
        assert dense.refusal(layout, dtype) is None
        found = dense.dequantize(layout, parts, dtype)
        wanted = layout.dequantize(parts, dtype)
        assert found.dtype == dtype and found.shape == wanted.shape
        assert torch.equal(found.cpu(), wanted.cpu()), (dtype, (found.float() - wanted.float()).abs().max())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [52] if DEVICE == "cuda" else [64, 52])
def test_every_width(bits, k):
    same(layout := Affine(out_features=5, in_features=k, bits=bits, grid=Grid.along_k(16)), filled(layout))


@pytest.mark.parametrize("zero", ["constant", "value", "offset"])
@pytest.mark.parametrize("math", ["float32", "scales"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_every_formula(zero, math, stored):
    layout = Affine(
        out_features=6, in_features=64, bits=4, grid=Grid.along_k(32), zero=zero, zero_point=8.0, math=math, unit=1 / 7
    )
    for zeros in (torch.uint8, stored) if DEVICE == "cuda" else (torch.uint8, torch.int8, stored, torch.float32):
        same(layout, filled(layout, scale=stored, zero=zeros))


GRIDS = [Grid.along_k(8), Grid.along_k(12), Grid.along_k(1000), Grid("block", 4, 16), Grid("block", 16, 128),
         Grid("block", 3, 5), Grid("flat", 1, 16), Grid("flat", 1, 24), Grid("flat", 1, 7), Grid("strided", 1, 4),
         Grid("strided", 1, 16)]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [(16, 20)] if DEVICE == "cuda" else [(16, 64), (12, 40), (16, 20)], ids=str)
def test_every_grid(grid, size):
    n, k = size
    for layout in (
        Affine(out_features=n, in_features=k, bits=4, grid=grid, zero="value"),
        Affine(out_features=n, in_features=k, bits=3, grid=grid),
        Lookup(out_features=n, in_features=k, bits=4, grid=grid),
        Float8(out_features=n, in_features=k, grid=grid),
        Affine(out_features=n, in_features=k, bits=8, signed=True, grid=grid),
    ):
        same(layout, filled(layout), [torch.bfloat16])


@pytest.mark.parametrize("form", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_every_float8(form):
    layout = Float8(out_features=1, in_features=256, format=form, grid=Grid("block", 1, 256))
    codes = torch.arange(256).to(torch.uint8).view(layout.dtype)
    codes = torch.where(torch.isnan(codes.float()), torch.zeros(256).to(layout.dtype).float(), codes.float())
    for scales in (torch.ones(1, 1), torch.full((1, 1), 0.3, dtype=torch.bfloat16)):
        parts = {"qweight": codes.to(layout.dtype).view(1, 256).to(DEVICE), "scales": scales.to(DEVICE)}
        same(layout, parts)
    parts["qweight"] = torch.arange(256).to(torch.uint8).view(layout.dtype).view(1, 256).to(DEVICE)
    found, wanted = dense.dequantize(layout, parts), layout.dequantize(parts)
    assert torch.equal(torch.isnan(found), torch.isnan(wanted))


def test_every_power_of_two():
    layout = Lookup(out_features=1, in_features=256 * 8, bits=4, grid=Grid.along_k(8))
    parts = filled(layout)
    parts["scales"] = torch.arange(256).to(torch.uint8).view(torch.float8_e8m0fnu).view(1, 256).to(DEVICE)
    found, wanted = dense.dequantize(layout, parts), layout.dequantize(parts)
    assert torch.equal(found.nan_to_num(7.0).cpu(), wanted.nan_to_num(7.0).cpu())


NESTED = [
    {"table": True, "offset": True, "group": 4},
    {"dtype": "float8_e4m3fn", "group": 0, "divide": True},
    {"dtype": "float8_e4m3fn", "group": 0},
    {"dtype": "int8", "group": 2},
    {"group": 5},
    {"dtype": "float8_e5m2", "group": 3, "divide": True},
]


@pytest.mark.parametrize("nested", NESTED, ids=str)
def test_scales_under_scales(nested):
    for layout in (
        Lookup(out_features=7, in_features=64, bits=4, grid=Grid.along_k(16), scales_nested=Nested(**nested)),
        Affine(
            out_features=7,
            in_features=64,
            bits=2,
            grid=Grid.along_k(16),
            zero="offset",
            scales_nested=Nested(**nested),
            zeros_nested=Nested("uint8", group=4),
        ),
    ):
        same(layout, filled(layout))


@pytest.mark.parametrize("kinds", [k for n in (1, 2) for k in itertools.permutations(["permute", "scale"], n)], ids=str)
@pytest.mark.parametrize("behind", [None, "scale", "divide"])
def test_transforms(kinds, behind):
    transforms = [Transform(kind, "in") for kind in kinds]
    if behind:
        transforms.append(Transform(behind, "out"))
        transforms = [Transform("divide", "in") if t.kind == "scale" and t.side == "in" else t for t in transforms]
    layout = Affine(
        out_features=6, in_features=48, bits=4, grid=Grid.along_k(16), zero="value", transforms=tuple(transforms)
    )
    same(layout, filled(layout))


def test_batches_and_bands():
    layout = Affine(out_features=6, in_features=48, bits=4, grid=Grid.along_k(16), zero="value")
    several = [filled(layout, seed) for seed in range(6)]
    batch = {name: torch.stack([one[name] for one in several]).unflatten(0, (2, 3)) for name in several[0]}
    same(layout, batch)
    other = Lookup(out_features=3, in_features=48, bits=4, grid=Grid.along_k(16))
    stacked = Stacked.of([layout, other], [several[0], filled(other)])
    assert stacked is not None
    same(*stacked)


def test_pieces_of_a_matrix():
    layout = Lookup(out_features=16, in_features=64, bits=4, grid=Grid("block", 4, 16))
    parts = filled(layout)
    whole = layout.dequantize(parts)
    for top, bottom, left, right in ((3, 9, 0, 64), (0, 16, 16, 40), (8, 16, 32, 64), (5, 5, 0, 64)):
        out = torch.full((bottom - top, 80), 7.0, device=DEVICE)
        dense.write(dense.planned(layout), parts, out[:, : right - left], top, left)
        assert torch.equal(out[:, : right - left], whole[top:bottom, left:right])
        assert bool((out[:, right - left :] == 7.0).all())


def test_rows_that_do_not_lie_together():
    layout = Affine(out_features=8, in_features=48, bits=4, grid=Grid.along_k(16))
    parts = filled(layout)
    wide = torch.zeros(8, 100, dtype=torch.uint8, device=DEVICE)
    wide[:, 3:27] = parts["qweight"]
    same(layout, {**parts, "qweight": wide[:, 3:27]})
    flat = torch.zeros(8 * 24 + 1, dtype=torch.uint8, device=DEVICE)
    flat[1:] = parts["qweight"].flatten()
    same(layout, {**parts, "qweight": flat[1:].view(8, 24)})


TILED = [
    Affine(out_features=70, in_features=200, bits=4, grid=Grid.along_k(32), zero="value", math="scales"),
    Affine(out_features=130, in_features=300, bits=8, signed=True, grid=Grid.along_k(300), unit=1 / 127),
    Affine(out_features=16, in_features=96, bits=1, grid=Grid.along_k(96)),
    Affine(
        out_features=64,
        in_features=512,
        bits=4,
        grid=Grid.along_k(32),
        zero="offset",
        scales_nested=Nested(group=8),
        zeros_nested=Nested(group=8),
    ),
    Lookup(
        out_features=65,
        in_features=128,
        bits=4,
        grid=Grid.along_k(64),
        scales_nested=Nested(table=True, offset=True, group=4),
    ),
    Float8(out_features=96, in_features=128, grid=Grid("block", 32, 32)),
    Float8(out_features=3, in_features=40, format="e5m2", grid=Grid("block", 3, 40)),
    *(Affine(out_features=66, in_features=330, bits=b, grid=Grid.along_k(64), zero="value") for b in range(2, 9)),
    Affine(
        out_features=70,
        in_features=256,
        bits=4,
        grid=Grid.along_k(128),
        transforms=(Transform("scale", "in"), Transform("permute", "in"), Transform("scale", "out")),
    ),
]


@pytest.mark.parametrize("layout", TILED, ids=range(len(TILED)))
def test_tiles(layout):
    tiled, parts = Tiled.arrange(layout, filled(layout, scale=torch.bfloat16, zero=torch.uint8))
    same(tiled, parts)


def test_pieces_of_tiles():
    layout, parts = Tiled.arrange(plain := Lookup(out_features=200, in_features=512, bits=4, grid=Grid.along_k(64)),
                                  filled(plain))  # fmt: skip
    whole = layout.dequantize(parts)
    for top, bottom, left, right in ((64, 200, 128, 512), (0, 70, 256, 300), (128, 130, 0, 512)):
        out = torch.full((bottom - top, 520), 7.0, device=DEVICE)
        dense.write(dense.planned(layout), parts, out[:, : right - left], top, left)
        assert torch.equal(out[:, : right - left], whole[top:bottom, left:right])
        assert bool((out[:, right - left :] == 7.0).all())


def test_says_what_it_cannot_do():
    rotated = Affine(
        out_features=8, in_features=16, bits=4, grid=Grid.along_k(16), transforms=(Transform("hadamard", "in"),)
    )
    assert "hadamard" in dense.refusal(rotated, torch.float32)
    plain = Affine(out_features=8, in_features=16, bits=4, grid=Grid.along_k(16))
    assert "float64" in dense.refusal(plain, torch.float64)
