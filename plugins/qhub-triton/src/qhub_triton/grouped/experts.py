"""An experts implementation for transformers: one launch for all experts' gate and up, one for all their down.

``model.set_experts_implementation("qhub")`` after :func:`register`. Works on whatever experts module transformers'
``use_experts_implementation`` prepares, of whatever model; a module whose weights the kernels do not read runs its own
loop over the experts, and the logger ``qhub`` says why, once.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from qhub.decoding import operations
from qhub.decoding.operations import ACTIVATIONS
from qhub.layouts import Layout, Parts
from qhub.tensor import QuantizedTensor
from qhub_triton.decoding.gating import gate
from qhub_triton.grouped.admission import disagreement
from qhub_triton.grouped.combining import combined
from qhub_triton.grouped.product import Product, block_of, refusal
from qhub_triton.grouped.routing import Routes, routed

__all__ = ["NAME", "experts_forward", "register", "why_not"]

NAME = "qhub"

_log = logging.getLogger("qhub")
_said: set[str] = set()
_activations: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def register() -> None:
    """Offer the implementation to transformers, under the name ``"qhub"``."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME not in ALL_EXPERTS_FUNCTIONS:
        type(ALL_EXPERTS_FUNCTIONS).register(NAME, experts_forward)


def why_not(module: nn.Module, dtype: torch.dtype) -> str | None:
    """Return why the experts ``module`` runs its own loop for inputs of ``dtype``; None when the kernels run it."""
    if getattr(module, "has_post_expert_norm", False):
        return "its experts are followed by a norm of their own"
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    for name in names:
        weight = getattr(module, name, None)
        if not isinstance(weight, QuantizedTensor) or weight.ndim != 3:
            return f"{name} is no quantized weight of several experts"
        if weight.transposed != bool(getattr(module, "is_transposed", False)):
            return f"{name} is held the other way round than the module multiplies"
        if not weight.is_cuda:
            return f"{name} is on {weight.device.type}"
        reason = refusal(weight.quant_layout, weight.compute_dtype or dtype)
        if reason is not None:
            return f"{name}: {reason}"
    return None


# The kernels are launched past torch: a compiler must not look into it.
@torch.compiler.disable
def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the experts' output (tokens, hidden), as transformers' own implementations do."""
    reason = why_not(self, hidden_states.dtype)
    if reason is None and hidden_states.device != self.down_proj.device:
        reason = f"its inputs are on {hidden_states.device}, its weights on {self.down_proj.device}"
    if reason is not None:
        return _looped(self, reason, hidden_states, top_k_index, top_k_weights)
    tokens, top = top_k_index.shape
    gated = self.has_gate
    first_bias = second_bias = None
    if self.has_bias:
        first_bias = self.gate_up_proj_bias if gated else self.up_proj_bias
        second_bias = self.down_proj_bias
    tracked = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden_states, top_k_weights, first_bias, second_bias)
    )
    if tokens == 0:
        return torch.zeros_like(hidden_states)
    reason = _disagreement(self, hidden_states.dtype, tokens, top, tracked)
    if reason is not None:
        return _looped(self, reason, hidden_states, top_k_index, top_k_weights)
    first = self.gate_up_proj if gated else self.up_proj
    second = self.down_proj
    if tracked:
        return _tracked(self, hidden_states, top_k_index, top_k_weights, (first, second), (first_bias, second_bias))
    routes = _routes(self, hidden_states.dtype, top_k_index)
    dtype = first.compute_dtype or hidden_states.dtype
    product = _product(first, dtype)
    y = product(hidden_states.to(dtype), routes, top, None if first_bias is None else first_bias.to(dtype))
    if gated:
        activation = _activation(self)
        y = self._apply_gate(y) if activation is None else gate(y, activation)
    else:
        y = self.act_fn(y)
    dtype = second.compute_dtype or y.dtype
    y = _product(second, dtype)(y.to(dtype), routes, 0, None if second_bias is None else second_bias.to(dtype))
    return combined(y, top_k_index, top_k_weights, routes, first.shape[0]).to(hidden_states.dtype)


def _routes(module: Any, dtype: torch.dtype, top_k_index: Tensor) -> Routes:
    tokens, top = top_k_index.shape
    experts = module.down_proj.shape[0]
    ids = top_k_index.reshape(-1).contiguous()
    if _unsorted(tokens, top, experts):
        return Routes(ids, ids, ids, ids, ids, tokens * top, 1, True)
    return routed(ids, experts, _block(module, dtype, tokens * top))


def _block(module: Any, dtype: torch.dtype, pairs: int) -> int:
    """Return how many rows a tile has where ``pairs`` fall on the experts: as many as both products take."""
    most = min(product.most for product in _products(module, dtype))
    return block_of(pairs, module.down_proj.shape[0], most)


def _disagreement(module: Any, dtype: torch.dtype, tokens: int, top: int, tracked: bool) -> str | None:
    """Return how products of so many pairs differ from dense ones; tried once for each layout and way of cutting."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    single = not tracked and _unsorted(tokens, top, first.shape[0])
    block = 1 if single else _block(module, dtype, tokens * top)
    weights = (first, module.down_proj)
    for weight, product, per in zip(weights, _products(module, dtype), (0 if tracked else top, 0), strict=True):
        reason = disagreement(product, weight.parts, block, single, per)
        if reason is not None:
            return reason
    return None


def _unsorted(tokens: int, top: int, experts: int) -> bool:
    """Return whether each pair is best a tile of its own.

    A token's experts differ, and few tokens on many experts seldom share one: sorting would take longer than it takes
    to read a shared expert again.
    """
    return tokens == 1 or 4 * tokens * top <= experts


def _products(module: Any, dtype: torch.dtype) -> tuple[Product, Product]:
    """Return the products of both projections for inputs of ``dtype``."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    own = first.compute_dtype or dtype
    return _product(first, own), _product(module.down_proj, module.down_proj.compute_dtype or own)


def _product(weight: QuantizedTensor, dtype: torch.dtype) -> Product:
    key = ("grouped", dtype)
    product = weight.memo.get(key)
    if product is None or product.source is not weight.parts["qweight"]:
        product = weight.memo[key] = Product(weight.quant_layout, weight.parts, dtype)  # type: ignore[arg-type]
    return product


def _activation(module: Any) -> str | None:
    """Return the name of the activation if the module's gating is ``activation(g) * u`` of [g, u], by trying it; None:
    it is something else."""
    if module not in _activations:
        sample = torch.linspace(-4.0, 4.0, 4 * 32).view(4, 32)
        found = None
        try:
            seen = module._apply_gate(sample)
            for name in ACTIVATIONS:
                if torch.allclose(seen, operations.gate(sample, name), rtol=1e-6, atol=1e-7):
                    found = name
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            # One that holds tensors on the GPU, say: then it is called as it is.
            _log.debug("the gating of %s was not tried: %s", type(module).__name__, error)
        _activations[module] = found
    return _activations[module]


def _looped(module: Any, reason: str, *inputs: Tensor) -> Tensor:
    """Run the module's own loop over its experts, and say why, once."""
    message = f"{type(module).__name__} loops over its experts: {reason}"
    if message not in _said:
        _said.add(message)
        _log.warning(message)
    return type(module).forward.__wrapped__(module, *inputs)  # type: ignore[attr-defined]


# -- with gradients ----------------------------------------------------------------------------------------------------


def _tracked(
    module: Any,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    projections: tuple[QuantizedTensor, QuantizedTensor],
    biases: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """Compute the same with gradients to the inputs, the router's weights and the biases: products by the kernels, what
    is between them by torch."""
    tokens, top = ids.shape
    experts = projections[0].shape[0]
    routes = routed(ids.reshape(-1).contiguous(), experts, _block(module, hidden.dtype, tokens * top))
    order = routes.order.long()
    numbers = ids.reshape(-1)[order]
    known = ((numbers >= 0) & (numbers < experts)).unsqueeze(-1)
    held = numbers.clamp(0, experts - 1)
    y = hidden[order // top]
    for index, (weight, bias) in enumerate(zip(projections, biases, strict=True)):
        dtype = weight.compute_dtype or y.dtype
        y = _Grouped.apply(y.to(dtype), weight.quant_layout, weight.parts, _product(weight, dtype), routes)
        # Rows without an expert were not written.
        y = torch.where(known, y, torch.zeros((), dtype=y.dtype, device=y.device))
        if bias is not None:
            y = y + bias[held].to(y.dtype)
        if index == 0:
            y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = torch.where(known, y, torch.zeros((), dtype=y.dtype, device=y.device))
    y = y[routes.position.long()].view(tokens, top, -1)
    shares = torch.where((ids >= 0) & (ids < experts), weights, torch.zeros((), dtype=weights.dtype, device=ids.device))
    return (y.float() * shares.float().unsqueeze(-1)).sum(1).to(hidden.dtype)


class _Grouped(torch.autograd.Function):
    """Multiplies sorted rows with their experts' weights; backward holds one expert's dense weight at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, parts: Parts, product: Product, routes: Routes) -> Tensor:
        ctx.layout, ctx.names, ctx.experts = layout, tuple(parts), product.experts
        ctx.save_for_backward(routes.experts, routes.starts, routes.ends, *parts.values())
        return product(x, routes, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from qhub.kernels.dense import dense

        experts, starts, ends, *values = ctx.saved_tensors
        parts = dict(zip(ctx.names, values, strict=True))
        specs = ctx.layout.part_specs()
        grad_x = torch.zeros(grad.shape[0], ctx.layout.in_features, dtype=grad.dtype, device=grad.device)
        # The one question to the device, and not in a forward: which rows are whose.
        for expert, begin, end in _spans(experts.tolist(), starts.tolist(), ends.tolist()):
            own = {name: part[expert] if specs[name].batched else part for name, part in parts.items()}
            grad_x[begin:end] = grad[begin:end] @ dense(ctx.layout, own, grad.dtype)
        return grad_x, None, None, None, None


def _spans(experts: list[int], starts: list[int], ends: list[int]) -> list[tuple[int, int, int]]:
    """Return (expert, first row, last row + 1) of each expert that has rows."""
    spans: dict[int, tuple[int, int]] = {}
    for expert, start, end in zip(experts, starts, ends, strict=True):
        if expert >= 0 and start < end:
            spans[expert] = (min(start, spans.get(expert, (start, end))[0]), end)
    return [(expert, start, end) for expert, (start, end) in spans.items()]
