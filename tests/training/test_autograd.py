"""The backward pass of a quantized layer: what it keeps, what it computes, and under which of torch's machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qhub import QuantizedTensor, QuantLinear
from qhub.kernels.dense import dense
from qhub.layouts import Affine, Grid, Layout, Lookup, Nested, Transform
from qhub.layouts.chunks import chunk_size

# Unit roundoff of float32.
UNIT = 2.0**-24


def nf4_nested(n: int, k: int, seed: int = 0) -> tuple[Layout, dict[str, Tensor]]:
    """Return NF4-like codes under nested scales whose second level runs over many rows."""
    g = torch.Generator().manual_seed(seed)
    grid = Grid.flat_runs(64, k)
    layout = Lookup(
        out_features=n, in_features=k, grid=grid, scales_nested=Nested("uint8", group=256, table=True, offset=True)
    )
    count = -(-n * k // 64)
    parts = {
        "qweight": torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8),
        "table": torch.linspace(-1, 1, 16),
        "scales": torch.randint(0, 256, grid.scale_shape(n, k), generator=g, dtype=torch.uint8),
        "scales_super": torch.rand(-(-count // 256), generator=g) * 0.01 + 0.01,
        "scales_table": torch.linspace(-1, 1, 256),
        "scales_offset": torch.tensor(0.03),
    }
    return layout, parts


def act_order(n: int, k: int, seed: int = 0) -> tuple[Layout, dict[str, Tensor]]:
    """Return 4-bit codes with zeros, columns permuted."""
    g = torch.Generator().manual_seed(seed)
    layout = Affine(
        out_features=n,
        in_features=k,
        bits=4,
        grid=Grid.along_k(32),
        zero="value",
        transforms=(Transform("permute", "in"),),
    )
    parts = {
        "qweight": torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8),
        "scales": torch.rand(n, k // 32, generator=g) * 0.02,
        "zeros": torch.randint(0, 16, (n, k // 32), generator=g, dtype=torch.uint8),
        "in_perm": torch.randperm(k, generator=g).to(torch.int32),
    }
    return layout, parts


def strided(n: int, k: int, seed: int = 0) -> tuple[Layout, dict[str, Tensor]]:
    """Return 3-bit codes in groups that have members in every row: rows cannot be cut out."""
    g = torch.Generator().manual_seed(seed)
    grid = Grid("strided", 1, 64)
    layout = Affine(out_features=n, in_features=k, bits=3, grid=grid, zero="value")
    shape = grid.scale_shape(n, k)
    parts = {
        "qweight": torch.randint(0, 256, (n, 3 * k // 8), generator=g, dtype=torch.uint8),
        "scales": torch.rand(shape, generator=g) * 0.02,
        "zeros": torch.rand(shape, generator=g) * 7,
    }
    return layout, parts


MAKERS: dict[str, Callable[..., tuple[Layout, dict[str, Tensor]]]] = {
    "nf4_nested": nf4_nested,
    "act_order": act_order,
    "strided": strided,
}


def weight_of(name: str, n: int = 96, k: int = 128, seed: int = 0) -> QuantizedTensor:
    return QuantizedTensor.build(*MAKERS[name](n, k, seed), torch.float32)


def layer_of(name: str, n: int = 96, k: int = 128, seed: int = 0) -> QuantLinear:
    layer = QuantLinear.hollow(k, n, None, torch.float32)
    layer.weight = nn.Parameter(weight_of(name, n, k, seed), requires_grad=False)
    return layer


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Counter:
    """Counts how many weights are decoded, in units of one whole matrix."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[Layout]) -> None:
        self.rows = 0
        original = kind.dequantize

        def counted(layout: Layout, *args: Any, **kwargs: Any) -> Tensor:
            self.rows += layout.out_features
            return original(layout, *args, **kwargs)

        monkeypatch.setattr(kind, "dequantize", counted)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("wants", ["input", "bias", "both", "nothing"])
def test_only_the_codes_are_saved_and_by_reference(name: str, wants: str) -> None:
    weight, saved = weight_of(name), []
    x = random(5, 128).requires_grad_(wants in ("input", "both"))
    bias = torch.zeros(96, requires_grad=wants in ("bias", "both"))
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        F.linear(x, weight, bias)
    expected = list(weight.parts.values()) if wants in ("input", "both") else []
    assert [t.data_ptr() for t in saved] == [part.data_ptr() for part in expected]
    assert not any(t.is_floating_point() and t.numel() >= weight.numel() for t in saved)


@pytest.mark.parametrize("name", MAKERS)
def test_backward_runs_on_what_hooks_give_back(name: str) -> None:
    """Where hooks keep copies (offloading, compression), the backward sees those, not the weight as it is by then."""
    weight, x = weight_of(name), random(5, 128).requires_grad_()
    expected = weight.dequantize().sum(0).expand(5, 128)
    F.linear(x, weight)
    with saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        y = F.linear(x, weight)
    with torch.no_grad():
        weight.copy_(weight.dequantize() / 2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_backward_dequantizes_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QHUB_KERNEL", "reference")
    weight = weight_of(name)
    x = random(5, 128).requires_grad_()
    y = F.linear(x, weight)
    counter = Counter(monkeypatch, type(weight.quant_layout))
    y.sum().backward()
    assert counter.rows == 96


@pytest.mark.parametrize("name", MAKERS)
def test_large_matrices_are_decoded_in_pieces_to_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 1000, 512
    assert n * k > 3 * chunk_size(torch.device("cpu"))
    layout, parts = MAKERS[name](n, k)
    whole = layout.dequantize(parts, torch.bfloat16)
    sizes: list[int] = []
    original = type(layout).dequantize

    def seen(one: Layout, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(one.out_features)
        return original(one, *args, **kwargs)

    monkeypatch.setattr(type(layout), "dequantize", seen)
    assert torch.equal(dense(layout, parts, torch.bfloat16), whole)
    assert sum(sizes) == n
    # Groups across all rows leave nothing to cut.
    assert (len(sizes) == 1) == (name == "strided")


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_those_of_float64(name: str) -> None:
    weight = weight_of(name)
    x, bias, upstream = random(2, 3, 128).requires_grad_(), random(96).requires_grad_(), random(2, 3, 96, seed=2)
    F.linear(x, weight, bias).backward(upstream)
    truth = weight.dequantize(torch.float64)
    expected = upstream.double() @ truth
    # 96 products and sums in float32, one rounding each, and six of a decoded weight.
    bound = (96 + 6) * UNIT * (upstream.double().abs() @ truth.abs())
    assert x.grad is not None and bias.grad is not None
    assert bool(((x.grad.double() - expected).abs() <= bound).all())
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))


@pytest.mark.parametrize("name", MAKERS)
def test_experts_train_like_their_dense_twins(name: str) -> None:
    """Fused experts are a 3-D weight: each one's product sees only its own codes."""
    made = [MAKERS[name](96, 128, seed) for seed in range(3)]
    layout = made[0][0]
    parts = {
        part: torch.stack([one[1][part] for one in made]) if spec.batched else made[0][1][part]
        for part, spec in layout.part_specs().items()
    }
    experts, saved = QuantizedTensor.build(layout, parts, torch.float32), []
    x = random(3, 4, 128).requires_grad_()
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = torch.stack([F.linear(x[index], experts[index]) for index in range(3)])
    storages = {part.untyped_storage().data_ptr() for part in parts.values()}
    assert {t.untyped_storage().data_ptr() for t in saved} <= storages
    upstream = random(3, 4, 96, seed=2)
    y.backward(upstream)
    truth = experts.dequantize(torch.float64)
    assert x.grad is not None
    bound = (96 + 6) * UNIT * (upstream.double().abs() @ truth.abs())
    assert bool(((x.grad.double() - upstream.double() @ truth).abs() <= bound).all())


@pytest.mark.parametrize("name", MAKERS)
def test_double_backward_is_right(name: str) -> None:
    weight = weight_of(name, 24, 64)
    x = random(2, 64).double().requires_grad_()
    # Not linear in the product, so that the second derivative is not 0.
    assert torch.autograd.gradcheck(lambda value: F.linear(value, weight).sin(), x)
    assert torch.autograd.gradgradcheck(lambda value: F.linear(value, weight).sin(), x)


class Adapted(nn.Module):
    """Is a quantized layer with a LoRA branch and a nonlinearity, twice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.base = nn.ModuleList([layer_of(name, 128, 128, seed) for seed in range(2)])
        self.a = nn.ParameterList([random(4, 128, seed=seed) * 0.1 for seed in (5, 6)])
        self.b = nn.ParameterList([random(128, 4, seed=seed) * 0.1 for seed in (7, 8)])

    def one(self, x: Tensor, index: int) -> Tensor:
        return torch.tanh(self.base[index](x) + F.linear(F.linear(x, self.a[index]), self.b[index]))

    def forward(self, x: Tensor, reentrant: bool | None = None) -> Tensor:
        for index in range(2):
            if reentrant is None:
                x = self.one(x, index)
            else:
                x = checkpoint(self.one, x, index, use_reentrant=reentrant)
        return x


def gradients(model: Adapted, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    x = random(3, 128).requires_grad_()
    run(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in [*model.a, *model.b])]  # type: ignore[list-item]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = Adapted("nf4_nested")
    expected = gradients(model, model)
    found = gradients(model, lambda x: model(x, reentrant=reentrant))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["nf4_nested", "act_order"])
def test_compiled_whole_with_the_same_gradients(name: str) -> None:
    torch._dynamo.reset()
    model = Adapted(name)
    expected = gradients(model, model)
    found = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    # A compiled graph may add in another order: 128 terms of size 1.
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_compiled_layer_saves_no_float_of_the_weight() -> None:
    torch._dynamo.reset()
    layer, saved = layer_of("nf4_nested", 96, 128), []
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = random(5, 128).requires_grad_()
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        compiled(x).square().sum()
    assert saved
    assert not any(t.is_floating_point() and t.numel() >= 96 * 128 for t in saved)


def test_compiled_and_checkpointed() -> None:
    torch._dynamo.reset()
    model = Adapted("nf4_nested")
    expected = gradients(model, model)
    compiled = torch.compile(lambda x: model(x, reentrant=False), fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(model, compiled), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
