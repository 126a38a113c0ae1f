"""Checks every quantized layer against ``x @ dequantize().T`` in float64, for few and many rows, in two dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qhub.layouts.activations import rounded_input
from qhub.layouts.transforms import transform_input
from qhub.tensor import QuantizedTensor
from qhub.testing.conformance.subject import KitBase, Subject
from qhub.testing.conformance.workbench import Workbench, bands_of, matrices_of, quantized_weights

__all__ = ["NumericsChecks", "allowed_error"]

# One row is decoding, three a small batch, seventeen no multiple of any tile.
_ROWS = (1, 3, 17)


def allowed_error(x: Tensor, weight: QuantizedTensor, dense: Tensor, exact: Tensor, bias: Tensor | None) -> Tensor:
    """Return how far each element of a product (M, N) may lie from ``exact``.

    ``x`` (M, K): the input as given. ``dense`` (N, K), ``exact`` (M, N), ``bias`` (N): float64. With u the unit
    roundoff of the dtype that the product runs in: weights and inputs are rounded to it once each, the output
    once, and once more to x's dtype; sums of K products in float32 round K times (Higham 2002, section 3.1). A
    rotated layout rounds what it stores, not ``dense``, so errors are bounded through norms, which rotations
    keep. An activation scheme adds what rounding this very input moves.
    """
    compute = torch.finfo(weight.compute_dtype or x.dtype).eps / 2
    output = torch.finfo(x.dtype).eps / 2
    k = x.shape[1]
    rows = x.double().norm(dim=1, keepdim=True)
    columns = dense.norm(dim=1)
    # x, W, and the scale within W's formula; three roundings at most, plus those of transforms.
    transforms = max(len(band.transforms) for _, band in bands_of(weight.quant_layout))
    roundings = 3 + 2 * transforms
    bound = rows * columns * (roundings * compute + 2 * k * torch.finfo(torch.float32).eps / 2)
    bound = bound + exact.abs() * (compute + output)
    if bias is not None:
        bound = bound + bias.abs() * (compute + output)
    return bound + _input_error(x, weight, compute)


def _input_error(x: Tensor, weight: QuantizedTensor, compute: float) -> Tensor:
    """Return how far rounding the input as the layout's activation scheme says moves each element (M, N) at most."""
    scheme = weight.quant_layout.activation
    if scheme.kind == "none":
        return torch.zeros((), dtype=torch.float64)
    bands = []
    for prefix, layout in bands_of(weight.quant_layout):
        own = {name.removeprefix(prefix): part for name, part in weight.parts.items() if name.startswith(prefix)}
        inner = transform_input(x.float(), layout, own)
        # What is rounded is the transformed input, which another kernel may hold in the layer's own dtype.
        slack = compute * inner.double().norm(dim=1, keepdim=True) if layout.transforms else 0.0
        if scheme.threshold:
            # Columns with outliers are kept aside: half a step of what is left is no more than this.
            moved = (0.5 * inner.abs().amax(dim=1, keepdim=True) / 127).double().expand(inner.shape) + slack
        else:
            moved = (rounded_input(inner, scheme, own).double() - inner.double()).abs() + slack
        stored = layout.decode(own).double()
        if any(step.side == "out" for step in layout.transforms):
            # An output rotation mixes rows, and keeps the length of each column.
            rotated = moved.norm(dim=1, keepdim=True) * torch.linalg.matrix_norm(stored)
            bands.append(rotated.expand(-1, layout.out_features))
        else:
            bands.append(moved @ stored.abs().t())
    return torch.cat(bands, dim=1) * (1 + compute)


class NumericsChecks(KitBase):
    """Runs the layers with whatever kernel the dispatcher picks."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_every_layer_matches_float64(self, subject: Subject, dtype: torch.dtype, bench: Workbench) -> None:
        """Each layer's output is the float64 product with its dequantized weight, up to rounding; bias included."""
        generator = torch.Generator().manual_seed(2)
        for name, weight, run, bias in _layers(bench.model(subject)):
            dense = weight.dequantize(torch.float32).double()
            for count in _ROWS:
                x = torch.randn(count, weight.shape[1], generator=generator).to(dtype)
                with torch.no_grad():
                    found = run(x)
                assert found.dtype == dtype, f"{name}: {dtype} input gives {found.dtype}"
                exact = torch.nn.functional.linear(x.double(), dense)
                allowed = allowed_error(x, weight, dense, exact, bias)
                exact = exact if bias is None else exact + bias
                excess = ((found.double() - exact).abs() / allowed.clamp_min(1e-30)).max()
                assert float(excess) <= 1, (
                    f"{name}, M={count}: {float(excess):.2f} times further from float64 than rounding explains "
                    f"({weight.quant_layout})"
                )

    def test_dequantize_is_a_function_of_the_parts(self, single: Subject, bench: Workbench) -> None:
        """Dequantizing changes nothing, twice gives the same, and a lower dtype is the float32 result rounded."""
        for name, weight in quantized_weights(bench.model(single)).items():
            first = weight.dequantize(torch.float32)
            assert bool(torch.isfinite(first).all()), f"{name} dequantizes to NaN or infinity"
            assert torch.equal(weight.dequantize(torch.bfloat16), first.to(torch.bfloat16)), name
            assert torch.equal(weight.dequantize(torch.float32), first), name
            assert first.shape == weight.shape

    def test_gradients_flow_to_inputs(self, single: Subject, bench: Workbench) -> None:
        """The input's gradient is grad @ dequantize(), and the weight takes none."""
        name, weight, run, _ = next(_layers(bench.model(single)))
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(3), requires_grad=True)
        y = run(x)
        outer = torch.ones_like(y)
        y.backward(outer)
        dense = weight.dequantize(torch.float32).double()
        exact = outer.double() @ dense
        unit = torch.finfo(weight.compute_dtype or x.dtype).eps
        allowed = 4 * unit * outer.double().norm(dim=1, keepdim=True) * dense.norm(dim=0) * len(dense) ** 0.5 + 1e-12
        assert x.grad is not None, f"{name}: no gradient reached the input"
        assert bool(((x.grad.double() - exact).abs() <= allowed).all()), f"{name}: the input's gradient is wrong"
        assert weight.grad is None


def _layers(model: Any) -> Iterator[tuple[str, QuantizedTensor, Any, Tensor | None]]:
    """Yield (name, matrix (N, K), function of x, bias) for every quantized layer; fused experts one by one."""
    for name, weight in quantized_weights(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.Linear):
            yield name, weight, module, None if module.bias is None else module.bias.detach().double()
            continue
        for index, matrix in enumerate(matrices_of(weight)):
            yield f"{name}[{index}]", matrix, lambda x, m=matrix: torch.nn.functional.linear(x, m), None
