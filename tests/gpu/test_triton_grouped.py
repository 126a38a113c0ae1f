"""On a GPU: fused experts by grouped kernels against a loop in float64, in a CUDA graph, and with gradients."""

from __future__ import annotations

import pytest
import torch

from qhub.layouts import Affine, Float8, Grid, Lookup, Nested
from qhub.layouts.tiled import Tiled
from qhub.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
experts = pytest.importorskip("qhub_triton.grouped.experts")

HIDDEN, INNER, COUNT, TOP = 512, 384, 16, 4


class Experts(torch.nn.Module):
    """Has what transformers' ``use_experts_implementation`` gives a module."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, False
    _is_expert_parallel = False
    num_experts = COUNT

    def __init__(self, layout_of, dtype):
        super().__init__()
        self.dense = []
        for seed, (name, n, k) in enumerate((("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER))):
            layout = layout_of(n, k)
            parts = filled(layout, seed)
            self.dense.append(layout.dequantize(parts))
            weight = QuantizedTensor.build(*Tiled.arrange(layout, parts), dtype)
            setattr(self, name, torch.nn.Parameter(weight, requires_grad=False))

    def act_fn(self, x):
        return torch.nn.functional.silu(x)

    def _apply_gate(self, y):
        gate, up = y.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def looped(self, x, ids, weights, dtype):
        """Return the sum over a token's experts, computed in ``dtype`` on dense weights, one expert at a time."""
        total = torch.zeros(x.shape[0], HIDDEN, dtype=torch.float64, device="cuda")
        for expert in range(COUNT):
            token, choice = torch.where(ids == expert)
            inner = self._apply_gate(x[token].to(dtype) @ self.dense[0][expert].to(dtype).t())
            y = inner @ self.dense[1][expert].to(dtype).t()
            total = total.index_add(0, token, y.double() * weights[token, choice, None].double())
        return total


def filled(layout, seed):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    parts = {}
    for name, spec in layout.core_specs().items():
        shape = (COUNT, *spec.shape) if spec.batched else spec.shape
        dtype = spec.dtypes[-1] if name == "scales" and torch.float8_e8m0fnu in spec.dtypes else spec.dtypes[0]
        if layout.kind == "float8" and name == "scales":
            dtype = torch.float32
        if dtype is torch.float8_e8m0fnu:
            codes = torch.randint(118, 122, shape, generator=generator, device="cuda")
            parts[name] = codes.to(torch.uint8).view(dtype)
        elif dtype in (torch.uint8, torch.int8):
            low = 0 if dtype is torch.uint8 else -128
            top = 16 if name == "zeros" else low + 256
            parts[name] = torch.randint(low, top, shape, generator=generator, device="cuda").to(dtype)
        elif dtype.itemsize == 1:
            parts[name] = torch.randn(shape, generator=generator, device="cuda").to(dtype)
        elif name == "table" or name.endswith("_table"):
            parts[name] = torch.linspace(-1, 1, shape[0], device="cuda")
        elif name == "zeros":
            parts[name] = (torch.rand(shape, generator=generator, device="cuda") * 15).to(dtype)
        else:
            parts[name] = ((torch.rand(shape, generator=generator, device="cuda") + 0.5) * 0.01).to(dtype)
    return parts


LAYOUTS = {
    "int4": lambda n, k: Affine(out_features=n, in_features=k, bits=4, grid=Grid.along_k(128), zero_point=8.0),
    "zeros": lambda n, k: Affine(out_features=n, in_features=k, bits=4, grid=Grid.along_k(64), zero="value"),
    "int8": lambda n, k: Affine(out_features=n, in_features=k, bits=8, signed=True, grid=Grid.along_k(k), unit=1 / 127),
    "mxfp4": lambda n, k: Lookup(out_features=n, in_features=k, bits=4, grid=Grid.along_k(32)),
    "nf4": lambda n, k: Lookup(
        out_features=n, in_features=k, bits=4, grid=Grid.along_k(64), scales_nested=Nested(table=True, offset=True)
    ),
    "fp8": lambda n, k: Float8(out_features=n, in_features=k, grid=Grid("block", 128, 128)),
}


def routed(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(COUNT, generator=generator)[:TOP] for _ in range(tokens)])
    return ids.cuda(), torch.rand(tokens, TOP, generator=generator).cuda()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_against_a_loop(kind):
    module = Experts(LAYOUTS[kind], torch.bfloat16)
    # One token; few rows, some and many rows of an expert: each is kernels to compile.
    for tokens in (1, 5, 40, 600) if kind in ("int4", "zeros") else (1, 40):
        ids, weights = routed(tokens)
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        assert experts.why_not(module, x.dtype) is None
        wanted = module.looped(x, ids, weights, torch.float64)
        own = (experts.experts_forward(module, x, ids, weights).double() - wanted).norm() / wanted.norm()
        plain = (module.looped(x, ids, weights, torch.bfloat16).bfloat16().double() - wanted).norm() / wanted.norm()
        assert own < 1.2 * plain, (tokens, float(own), float(plain))


def test_the_same_each_time_and_in_a_graph():
    module = Experts(LAYOUTS["int4"], torch.bfloat16)
    for tokens in (1, 7, 100):
        ids, weights = routed(tokens)
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        wanted = experts.experts_forward(module, x, ids, weights)
        other, _ = routed(tokens, 1)
        elsewhere = experts.experts_forward(module, x, other, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = experts.experts_forward(module, x, ids, weights)
        graph.replay()
        assert torch.equal(y, wanted)
        # The graph holds no routes: other experts need no new one.
        ids.copy_(other)
        graph.replay()
        assert torch.equal(y, elsewhere)


def test_gradients():
    module = Experts(LAYOUTS["zeros"], torch.bfloat16)
    ids, weights = routed(50)
    x = torch.randn(50, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights.requires_grad_()
    experts.experts_forward(module, x, ids, weights).float().square().sum().backward()
    x64, w64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    module.looped(x64, ids, w64, torch.float64).square().sum().backward()
    for own, other in ((x.grad, x64.grad), (weights.grad, w64.grad)):
        assert (own.double() - other).norm() / other.norm() < 2.0**-6
