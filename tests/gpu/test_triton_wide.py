"""On a GPU of Hopper's kind: the product for many rows against float64, each time the same, in graphs, odd ends."""

from __future__ import annotations

import pytest
import torch

from qhub.layouts import Affine, Float8, Grid, Lookup
from qhub.layouts.packing import pack
from qhub.layouts.tiled import Tiled

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no GPU of Hopper's kind"
)
pytest.importorskip("qhub_triton.wide.kernel")
from qhub_triton.wide.linear import bind, tunables  # noqa: E402

NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0]


def affine(bits=4, group=128, n=264, k=1152, **more):
    return Affine(
        out_features=n, in_features=k, bits=bits, grid=Grid.along_k(group), **{"zero_point": 2.0 ** (bits - 1), **more}
    )


def made(layout, seed=0, stored=torch.bfloat16):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    n, k = layout.out_features, layout.in_features

    def drawn(shape):
        return torch.rand(shape, generator=generator, device="cuda")

    parts = {"scales": (drawn(layout.scale_shape) + 0.1).to(stored)}
    if isinstance(layout, Float8):
        parts["qweight"] = torch.randn(n, k, generator=generator, device="cuda").to(torch.float8_e4m3fn)
        parts["scales"] = parts["scales"].float()
        return parts
    codes = torch.randint(0, 2**layout.bits, (n, k), generator=generator, device="cuda")
    parts["qweight"] = pack(codes.to(torch.uint8), 4) if isinstance(layout, Lookup) else layout.pack_codes(codes)
    if isinstance(layout, Lookup):
        parts["scales"] = parts["scales"].float()
        parts["table"] = torch.tensor(NF4, device="cuda")
    elif layout.zero != "constant":
        zeros = drawn(layout.scale_shape) * 2**layout.bits
        parts["zeros"] = zeros.to(torch.uint8) if seed % 2 else zeros.to(stored)
    return parts


def check(layout, m, split=1, dtype=torch.bfloat16, seed=0, biased=False, stored=torch.bfloat16):
    parts = made(layout, seed, stored)
    tiled, own = Tiled.arrange(layout, parts)
    run = bind(tiled, own, dtype, {"kernel": "wide", "split": split, "stages": 9})
    generator = torch.Generator(device="cuda").manual_seed(seed + 1)
    x = torch.randn(m, layout.in_features, generator=generator, device="cuda").to(dtype)
    bias = torch.randn(layout.out_features, generator=generator, device="cuda").to(dtype) if biased else None
    found = run(x, bias)
    weight = layout.dequantize(parts, torch.float32).double()
    wanted = x.double() @ weight.T
    dense = x.double() @ weight.to(dtype).double().T
    if bias is not None:
        wanted, dense = wanted + bias.double(), dense + bias.double()
    dense = dense.to(dtype).double()
    error, usual = (float((one - wanted).norm() / wanted.norm()) for one in (found.double(), dense))
    assert found.shape == wanted.shape and found.dtype == dtype
    # Numbers of a table are rounded too.
    assert error < (1.6 if isinstance(layout, Lookup) else 1.2) * usual, (error, usual)
    assert float((found.double() - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    for _ in range(5):
        assert torch.equal(run(x, bias), found)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("m", [1, 128, 129, 700])
def test_rows_and_parts(m, split):
    check(affine(), m, split, biased=True)


@pytest.mark.parametrize(("n", "k"), [(8, 8), (8, 136), (72, 2048), (8256, 1152), (3000, 4096)])
def test_odd_shapes_and_many_tiles(n, k):
    check(affine(n=n, k=k, group=128 if k % 128 == 0 else k), 600)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_width_and_scale(bits, stored, dtype):
    check(affine(bits), 200, dtype=dtype, stored=stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zero", ["value", "offset"])
@pytest.mark.parametrize("group", [32, 64, 96])
def test_every_zero_and_group(group, zero, dtype):
    for seed in (0, 1):
        check(affine(group=group, zero=zero, zero_point=0.0), 200, dtype=dtype, seed=seed)
    check(affine(8, group=group, zero=zero, zero_point=0.0), 200, dtype=dtype, seed=1)


@pytest.mark.parametrize("point", [0.0, 1.0, 7.5])
def test_zero_points(point):
    check(affine(zero_point=point), 200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_and_float8(dtype):
    check(Lookup(out_features=264, in_features=1152, grid=Grid.along_k(64)), 200, dtype=dtype)
    check(Float8(out_features=264, in_features=1152, grid=Grid.along_k(1152)), 200, dtype=dtype)
    check(Float8(out_features=256, in_features=1152, grid=Grid("block", 128, 128)), 200, dtype=dtype)


def test_in_a_graph_and_unaligned():
    layout = affine(n=4096, k=4096)
    tiled, own = Tiled.arrange(layout, made(layout))
    run = bind(tiled, own, torch.bfloat16)
    x = torch.randn(513, 4096, device="cuda", dtype=torch.bfloat16)
    wanted = run(x, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(x, None)
    graph.replay()
    assert torch.equal(found, wanted)
    apart = torch.empty(513 * 4096 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(513, 4096)
    apart.copy_(x)
    # Another kernel's work: the unit that copies tiles begins at multiples of 16 bytes.
    assert float((run(apart, None).float() - wanted.float()).norm() / wanted.float().norm()) < 5e-3


def test_only_its_own_plans_are_tried():
    from qhub.kernels import Problem

    tiled, own = Tiled.arrange(affine(n=4096, k=4096), made(affine(n=4096, k=4096)))
    problem = Problem(tiled, "cuda", torch.bfloat16)
    assert not tunables(problem, own, 1)
    assert {one["kernel"] for one in tunables(problem, own, 512).values()} == {"wide"}
