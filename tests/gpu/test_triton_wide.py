"""On a GPU of Hopper's kind: the product for many rows against float64, each time the same, in graphs, odd ends."""

from __future__ import annotations

import pytest
import torch

from qhub.kernels import Problem
from qhub.layouts import Affine, Float8, Grid, Lookup
from qhub.layouts.packing import pack
from qhub.layouts.tiled import Tiled

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no GPU of Hopper's kind"
)
pytest.importorskip("qhub_triton.wide.kernel")
from qhub_triton.wide.linear import bind, probes, tunables  # noqa: E402

NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0]


def affine(bits=4, group=128, n=264, k=1152, **more):
    return Affine(
        out_features=n, in_features=k, bits=bits, grid=Grid.along_k(group), **{"zero_point": 2.0 ** (bits - 1), **more}
    )


def lookup(group=64, n=264, k=1152):
    return Lookup(out_features=n, in_features=k, grid=Grid.along_k(group))


def float8(group=1152, n=264, k=1152):
    return Float8(out_features=n, in_features=k, grid=Grid.along_k(group))


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


def check(layout, m, rows=128, split=1, dtype=torch.bfloat16, seed=0, biased=False, stored=torch.bfloat16):
    parts = made(layout, seed, stored)
    tiled, own = Tiled.arrange(layout, parts)
    run = bind(tiled, own, dtype, {"kernel": "wide", "split": split, "stages": 9, "rows": rows})
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


BOTH = pytest.mark.parametrize("rows", [128, 256])
# Scales of float32 are no numbers of bfloat16; a row of one scale has it multiplied by its sum.
KINDS = {
    "int4": affine,
    "row of int4": lambda n=264, k=1152: affine(group=k, n=n, k=k),
    "zeros": lambda n=264, k=1152: affine(zero="value", zero_point=0.0, n=n, k=k),
    "int8": lambda n=264, k=1152: affine(8, n=n, k=k),
    "row of int8": lambda n=264, k=1152: affine(8, group=k, n=n, k=k),
    "table": lambda n=264, k=1152: lookup(n=n, k=k),
    "table, 32": lambda n=264, k=1152: lookup(32, n=n, k=k),
    "row of table": lambda n=264, k=1152: lookup(k, n=n, k=k),
    "float8": lambda n=264, k=1152: float8(128, n=n, k=k),
    "row of float8": lambda n=264, k=1152: float8(k, n=n, k=k),
}


@BOTH
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("m", [1, 128, 129, 257, 700])
def test_rows_and_parts(m, split, rows):
    check(affine(), m, rows, split, biased=True)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, rows):
    # Whole numbers for zeros come with odd seeds.
    check(KINDS[kind](), 700, rows, seed=1, stored=torch.float32)
    check(KINDS[kind](), 700, rows, split=2, seed=1, biased=True, stored=torch.float32)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), [(513, 8256, 1152), (129, 2048, 128), (2048, 4096, 4096)])
def test_single_blocks_and_many_tiles(m, n, k, kind, rows):
    check(KINDS[kind](n=n, k=k), m, rows, seed=1)


@BOTH
@pytest.mark.parametrize(("n", "k"), [(8, 8), (8, 136), (72, 2048), (3000, 4096)])
def test_odd_shapes(n, k, rows):
    check(affine(n=n, k=k, group=128 if k % 128 == 0 else k), 600, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("bits", "rows"), [(2, 128), (4, 128), (8, 128), (4, 256), (8, 256)])
def test_every_width_and_scale(bits, rows, stored, dtype):
    check(affine(bits), 200, rows, dtype=dtype, stored=stored)
    if bits == 8:
        check(affine(bits, group=1152), 200, rows, dtype=dtype, stored=stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zero", ["value", "offset"])
@pytest.mark.parametrize(("group", "rows"), [(32, 128), (64, 128), (96, 128), (96, 256), (1152, 256)])
def test_every_zero_and_group(group, zero, dtype, rows):
    for seed in (0, 1):
        check(affine(group=group, zero=zero, zero_point=0.0), 200, rows, dtype=dtype, seed=seed)
    check(affine(8, group=group, zero=zero, zero_point=0.0), 200, rows, dtype=dtype, seed=1)


@BOTH
@pytest.mark.parametrize("group", [128, 1152])
@pytest.mark.parametrize("point", [0.0, 1.0, 7.5])
def test_zero_points(point, group, rows):
    check(affine(zero_point=point, group=group), 200, rows)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_and_float8(dtype, rows):
    for group in (32, 64, 1152):
        check(lookup(group), 200, rows, dtype=dtype)
    for group in (128, 1152):
        check(float8(group), 200, rows, dtype=dtype)
    check(Float8(out_features=256, in_features=1152, grid=Grid("block", 128, 128)), 200, rows, dtype=dtype)


def test_two_bits_have_no_tiles_of_256_rows():
    # A plan measured elsewhere: tiles of 128 then.
    check(affine(2), 300, 256)


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
    tiled, own = Tiled.arrange(affine(n=4096, k=4096), made(affine(n=4096, k=4096)))
    problem = Problem(tiled, "cuda", torch.bfloat16)
    assert not tunables(problem, own, 1)
    assert {one["kernel"] for one in tunables(problem, own, 512).values()} == {"wide"}
    assert {one["rows"] for one in tunables(problem, own, 512).values()} == {128, 256}


def test_what_is_chosen_for_more_rows_is_compared():
    tiled, own = Tiled.arrange(lookup(n=256), made(lookup(n=256)))
    problem = Problem(tiled, "cuda", torch.bfloat16)
    asked = [one for one in probes(problem, own) if not isinstance(one, int)]
    assert 256 in {config.get("rows") for _, config in asked} and all(m <= 300 for m, _ in asked)
