"""The grouped product with fused experts: against each expert's dense weight, for every way of storing and routing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qhub.layouts import Affine, Float8, Grid, Lookup, Nested
from qhub.layouts.packing import pack
from qhub.layouts.tiled import Tiled
from qhub.tensor import QuantizedTensor

routing = pytest.importorskip("qhub_triton.grouped.routing")
product = pytest.importorskip("qhub_triton.grouped.product")
combining = pytest.importorskip("qhub_triton.grouped.combining")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Triton's interpreter multiplies no bfloat16.
DTYPES = [torch.bfloat16 if DEVICE == "cuda" else torch.float16]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def experts_of(layout, count, seed=0, factor=1.0):
    """Return the layout in tiles, the parts of ``count`` experts, and their dense weights float64."""
    generator = seeded(seed)
    parts = {}
    for name, spec in layout.core_specs().items():
        shape = (count, *spec.shape) if spec.batched else spec.shape
        dtype = spec.dtypes[-1] if name == "zeros" and layout.zeros_nested is None else spec.dtypes[0]
        if name == "scales" and torch.float8_e8m0fnu in spec.dtypes and layout.kind == "lookup":
            dtype = torch.float8_e8m0fnu
        if name == "qweight" and dtype is torch.uint8:
            size = (count, layout.out_features, layout.in_features)
            parts[name] = pack(torch.randint(0, 2**layout.bits, size, generator=generator), layout.bits)
        elif dtype is torch.float8_e8m0fnu:
            parts[name] = torch.randint(122, 128, shape, generator=generator).to(torch.uint8).view(dtype)
        elif dtype in (torch.uint8, torch.int8):
            low, high = (0, 16) if name != "qweight" else (-128, 128)
            parts[name] = torch.randint(low, high, shape, generator=generator).to(dtype)
        elif dtype.itemsize == 1:
            parts[name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            parts[name] = ((torch.rand(shape, generator=generator) + 0.25) * (factor if name == "scales" else 1.0)).to(
                dtype
            )
    parts = {name: part.to(DEVICE) for name, part in parts.items()}
    dense = layout.dequantize(parts).double()
    tiled, arranged = Tiled.arrange(layout, parts)
    return tiled, arranged, dense


def expected_routes(ids, experts):
    known = torch.where((ids < 0) | (ids >= experts), experts, ids)
    return torch.sort(known.cpu(), stable=True)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(
    ("pairs", "experts", "block"), [(1, 4, 8), (16, 8, 8), (60, 5, 16), (130, 128, 8), (40, 1, 16)]
)
def test_routes(pairs, experts, block, small, monkeypatch):
    if not small:
        monkeypatch.setattr(routing, "_SMALL", 0)
    ids = torch.randint(-1, experts + 1, (pairs,), generator=seeded(pairs)).to(DEVICE)
    routes = routing.routed(ids, experts, block)
    ascending, order = expected_routes(ids, experts)
    assert torch.equal(routes.order.cpu().long(), order)
    assert torch.equal(routes.order.cpu().long()[routes.position.cpu().long()], torch.arange(pairs))
    seen = torch.zeros(pairs, dtype=torch.int64)
    for expert, start, end in zip(routes.experts.tolist(), routes.starts.tolist(), routes.ends.tolist(), strict=True):
        if expert < 0:
            continue
        last = min(end, start + block)
        assert start < last and bool((ascending[start:last] == expert).all())
        seen[start:last] += 1
    assert torch.equal(seen, (ascending < experts).long())


LAYOUTS = [
    Affine(out_features=70, in_features=200, bits=4, grid=Grid.along_k(32), zero="value"),
    Affine(out_features=64, in_features=256, bits=4, grid=Grid.along_k(128), zero_point=8.0),
    Affine(out_features=48, in_features=160, bits=3, grid=Grid.along_k(32), zero="offset", zero_point=4.0),
    Affine(out_features=48, in_features=128, bits=8, signed=True, grid=Grid.along_k(128), unit=1 / 127),
    Lookup(
        out_features=64,
        in_features=128,
        bits=4,
        grid=Grid.along_k(64),
        scales_nested=Nested(table=True, offset=True, group=8),
    ),
    Lookup(out_features=64, in_features=128, bits=4, grid=Grid.along_k(32)),
    Float8(out_features=64, in_features=128, grid=Grid("block", 32, 64)),
]


def compare(layout, tokens, top, experts=6, block=None, dtype=torch.float16, seed=0, bias=False, single=False):
    tiled, parts, dense = experts_of(layout, experts, seed)
    assert product.refusal(tiled, dtype) is None
    generator = seeded(seed + 1)
    x = torch.randn(tokens, layout.in_features, generator=generator).to(DEVICE, dtype)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top] for _ in range(tokens)]).to(DEVICE)
    biases = torch.randn(experts, layout.out_features, generator=generator).to(DEVICE, dtype) if bias else None
    flat = ids.reshape(-1)
    if single:
        routes = routing.Routes(flat, flat, flat, flat, flat, tokens * top, 1, True)
    else:
        routes = routing.routed(flat, experts, block or product.block_of(tokens * top, experts))
    y = product.Product(tiled, parts, dtype)(x, routes, top, biases)
    wanted = torch.einsum("tk,tjnk->tjn", x.double(), dense[ids])
    if bias:
        wanted = wanted + biases[ids].double()
    found = y.double().view(tokens, top, -1) if single else y[routes.position.long()].double().view(tokens, top, -1)
    error = float((found - wanted).norm() / wanted.norm())
    # The output is rounded once; weights of many rows are rounded to the input's dtype before.
    assert error < {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype], error
    weights = torch.rand(tokens, top, generator=generator).to(DEVICE)
    summed = combining.combined(y, ids, weights, routes, experts)
    wanted = (found * weights.double().unsqueeze(-1)).sum(1)
    assert (
        float((summed.double() - wanted).norm() / wanted.norm())
        < {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
@pytest.mark.parametrize("block", [8, 16])
def test_product(layout, block):
    for dtype in DTYPES:
        compare(layout, 7, 3, block=block, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=range(2))
def test_one_token(layout):
    for dtype in DTYPES:
        compare(layout, 1, 2, single=True, bias=True, dtype=dtype)


def test_pairs_that_are_not_sorted():
    compare(LAYOUTS[1], 3, 2, experts=7, single=True, dtype=DTYPES[0])


def test_many_rows_and_biases():
    for dtype in DTYPES:
        compare(LAYOUTS[0], 70, 2, experts=3, bias=True, dtype=dtype)
        compare(LAYOUTS[1], 40, 1, experts=3, dtype=dtype)


@pytest.mark.parametrize("index", range(len(LAYOUTS)))
def test_weights_scaled_early(index):
    for dtype in DTYPES:
        compare(LAYOUTS[index], 20, 1, experts=2, block=128, dtype=dtype)


NARROW = Affine(out_features=64, in_features=1024, bits=1, grid=Grid.along_k(128), zero_point=0.5)
# What an H100 gives a program.
SHARED = 227 << 10


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_tiles_fit_into_shared_memory(bits):
    layout = replace(NARROW, bits=bits, zero_point=2.0 ** (bits - 1))
    tiled, parts, _ = experts_of(layout, 2)
    own = product.Product(tiled, parts, DTYPES[0])
    assert own.most == (64 if bits == 1 else 128)
    ids = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rows = 16
    while rows <= own.most:
        launch, columns = own._launch(routing.routed(ids, 2, rows), 1, False)
        stages, block_m, block_n = (launch.constants[name] for name in ("STAGES", "BLOCK_M", "BLOCK_N"))
        assert block_m == rows and block_n == columns and stages >= 2
        # A stage: a block of inputs in 16 bits, and the words of a block of weights.
        assert stages * (rows * (16 // bits * 32) * 2 + block_n * 64) <= SHARED
        rows *= 2
    assert product.block_of(10_000, 2, own.most) == own.most


def test_narrow_codes_for_many_rows():
    tiled, parts, _ = experts_of(NARROW, 2)
    own = product.Product(tiled, parts, DTYPES[0])
    for dtype in DTYPES:
        compare(NARROW, 150, 1, experts=2, block=own.most, dtype=dtype)
    x = torch.zeros(150, 1024, dtype=DTYPES[0], device=DEVICE)
    ids = torch.zeros(150, dtype=torch.int64, device=DEVICE)
    # Rows past those that a program takes would be left out.
    with pytest.raises(ValueError, match="tiles of 128 rows"):
        own(x, routing.routed(ids, 2, 128), 1)


def test_refusals():
    plain = LAYOUTS[0]
    assert "tiles" in product.refusal(plain, torch.float16)
    assert "float32" in product.refusal(plain, torch.float32)


class Experts(torch.nn.Module):
    """Has what transformers' ``use_experts_implementation`` gives a module."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, False
    _is_expert_parallel = False

    def __init__(self, hidden, inner, count, bits=(4, 4)):
        super().__init__()
        self.num_experts = count
        self.dense = []
        shapes = (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner))
        for (name, n, k), width in zip(shapes, bits, strict=True):
            layout = Affine(out_features=n, in_features=k, bits=width, grid=Grid.along_k(32), zero="value")
            tiled, parts, dense = experts_of(layout, count, factor=0.02)
            weight = QuantizedTensor.build(tiled, parts, torch.float16)
            setattr(self, name, torch.nn.Parameter(weight, requires_grad=False))
            self.dense.append(dense)

    def act_fn(self, x):
        return torch.nn.functional.silu(x)

    def _apply_gate(self, y):
        gate, up = y.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def wanted(self, x, ids, weights):
        y = torch.einsum("tk,tjnk->tjn", x, self.dense[0].to(x.dtype)[ids])
        y = torch.einsum("tjk,tjnk->tjn", self._apply_gate(y), self.dense[1].to(x.dtype)[ids])
        return (y * weights.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("tokens", [5, 40])
def test_experts(tokens, monkeypatch):
    experts = pytest.importorskip("qhub_triton.grouped.experts")
    # In the interpreter there is no GPU to ask for.
    monkeypatch.setattr(QuantizedTensor, "is_cuda", True)
    module = Experts(64, 96, 6)
    generator = seeded(tokens)
    x = torch.randn(tokens, 64, generator=generator).to(DEVICE, torch.float16)
    ids = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(tokens)]).to(DEVICE)
    weights = torch.rand(tokens, 2, generator=generator).to(DEVICE)
    assert experts.why_not(module, x.dtype) is None
    found = experts.experts_forward(module, x, ids, weights)
    reference = module.wanted(x.double(), ids, weights.double())
    assert float((found.double() - reference).norm() / reference.norm()) < 2.0**-9
    x64, w64 = x.double().requires_grad_(), weights.double().requires_grad_()
    module.wanted(x64, ids, w64).square().sum().backward()
    x.requires_grad_(), weights.requires_grad_()
    tracked = experts.experts_forward(module, x, ids, weights)
    assert float((tracked.detach().double() - reference).norm() / reference.norm()) < 2.0**-9
    tracked.float().square().sum().backward()
    for own, other in ((x.grad, x64.grad), (weights.grad, w64.grad)):
        assert float((own.double() - other).norm() / other.norm()) < 2.0**-7


@pytest.mark.parametrize("bits", [(4, 1), (1, 4)])
def test_experts_of_which_one_projection_takes_fewer_rows(bits, monkeypatch):
    experts = pytest.importorskip("qhub_triton.grouped.experts")
    monkeypatch.setattr(QuantizedTensor, "is_cuda", True)
    module = Experts(64, 96, 2, bits)
    x = torch.randn(132, 64, generator=seeded()).to(DEVICE, torch.float16)
    ids = torch.tensor([[0], [1]], device=DEVICE).repeat(66, 1)
    weights = torch.ones(132, 1, device=DEVICE)
    blocks = []
    monkeypatch.setattr(experts, "routed", lambda *a, own=experts.routed: blocks.append(a[2]) or own(*a))
    found = experts.experts_forward(module, x, ids, weights)
    wanted = module.wanted(x.double(), ids, weights.double())
    assert float((found.double() - wanted).norm() / wanted.norm()) < 2.0**-9
    experts.experts_forward(module, x.requires_grad_(), ids, weights)
    assert blocks == [64, 64]


def test_experts_that_are_none(monkeypatch):
    experts = pytest.importorskip("qhub_triton.grouped.experts")
    monkeypatch.setattr(QuantizedTensor, "is_cuda", True)
    module = Experts(64, 96, 6)
    x = torch.randn(9, 64, generator=seeded()).to(DEVICE, torch.float16)
    ids = torch.tensor([[6, 0]] * 4 + [[1, 6]] * 4 + [[6, 6]], device=DEVICE)
    weights = torch.ones(9, 2, device=DEVICE)
    inside = ids < 6
    wanted = module.wanted(x.double(), ids.clamp(max=5), weights.double() * inside)
    found = experts.experts_forward(module, x, ids, weights)
    assert float((found.double() - wanted).norm() / wanted.norm()) < 2.0**-9
    one = experts.experts_forward(module, x[:1], ids[:1], weights[:1])
    assert float((one.double() - wanted[:1]).norm() / wanted[:1].norm()) < 2.0**-9
    x.requires_grad_()
    found = experts.experts_forward(module, x, ids, weights)
    assert float((found.detach().double() - wanted).norm() / wanted.norm()) < 2.0**-9
    found.float().sum().backward()
    assert bool((x.grad[8] == 0).all()) and bool(torch.isfinite(x.grad).all())
