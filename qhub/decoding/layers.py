"""Whole layers in fused form: a residual sum is left to the norm that follows it, also across layers.

What a layer returns is then the residual without its last summand, which travels beside it; the norm of the next layer
(or the last norm) adds it. That a layer's output goes there and nowhere else is seen in recorded calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qhub.decoding.operations import NormRule, Operations
from qhub.decoding.recipes import State, attention, gated_mlp, norm
from qhub.decoding.trials import Call, agree, tried

__all__ = ["Forms", "Layer", "in_form", "recognise"]

# What every later summand is kept under, on the tensor it belongs to.
_PENDING = "_qhub_pending"

Forms = dict[nn.Module, Callable[..., Any]]


@contextlib.contextmanager
def in_form(forms: Forms) -> Iterator[None]:
    """Put ``forms`` in place of the modules' forwards within."""
    for module, form in forms.items():
        module.__dict__["forward"] = form
    try:
        yield
    finally:
        for module in forms:
            module.__dict__.pop("forward", None)


def _take(x: Tensor) -> Tensor | None:
    pending = getattr(x, _PENDING, None)
    if pending is not None:
        delattr(x, _PENDING)
    return pending


def recognise(
    model: nn.Module, calls: dict[nn.Module, Call], operations: tuple[Operations, ...], state: State
) -> tuple[Forms, dict[str, int]]:
    """Return {module: the forward to use in its place} and how many parts of each kind were recognised."""
    norms: dict[nn.Module, tuple[Tensor, NormRule]] = {}
    attentions: dict[nn.Module, Callable] = {}
    mlps: dict[nn.Module, Callable] = {}
    for module, call in calls.items():
        if (found := norm(module, call)) is not None:
            norms[module] = found
        elif (found_attention := attention(module, call, calls, operations, state)) is not None:
            attentions[module] = found_attention
        elif (gated := gated_mlp(module, call, operations, state)) is not None:
            mlps[module] = gated
    layers: dict[nn.Module, Layer] = {}
    for module, call in calls.items():
        for family in operations:
            layer = Layer.of(module, call, calls, norms, attentions, mlps, family)
            if layer is not None:
                layers[module] = layer
                break
    forms: Forms = {}
    inside = {part for layer in layers.values() for child in layer.children for part in child.modules()}
    for module, layer in layers.items():
        output = calls[module].first_output()
        readers = [other for other, call in calls.items() if call.tensor() is output and other not in inside]
        layer.defers = len(readers) == 1 and (readers[0] in layers or readers[0] in norms)
        forms[module] = layer
    family = operations[0]
    for module, (weight, rule) in norms.items():
        if module not in inside:
            forms[module] = _final_norm(family, weight, rule)
    for module, attended in attentions.items():
        if module not in inside:
            forms[module] = _as_attention(attended)
    forms.update({module: gated for module, gated in mlps.items() if module not in inside})
    return forms, {"layers": len(layers), "norms": len(norms), "attentions": len(attentions), "mlps": len(mlps)}


def _final_norm(family: Operations, weight: Tensor, rule: NormRule) -> Callable[[Tensor], Tensor]:
    return lambda hidden_states: family.add_norm(hidden_states, _take(hidden_states), weight, rule)[1]


def _as_attention(attended: Callable) -> Callable[..., tuple[Tensor, None]]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return attended(hidden_states, kwargs), None

    return forward


class Layer:
    """Is the fused form of ``x += [norm] attention(norm(x)); x += [norm] mlp(norm(x))``, norms in brackets if any."""

    # Whether the last summand is left to the reader of the output.
    defers = False

    def __init__(self, family: Operations, attended: Callable, mlp: Callable, norms: list[Any], children: list[Any]):
        self.family, self.attended, self.mlp, self.children = family, attended, mlp, children
        self.before_attention, self.after_attention, self.before_mlp, self.after_mlp = norms

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, summand = self.parts(hidden_states, kwargs)
        if not self.defers:
            return x + summand
        if x is hidden_states:
            x = x.view_as(x)
        setattr(x, _PENDING, summand)
        return x

    def parts(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the residual and what is still to be added to it."""
        add_norm = self.family.add_norm
        x, y = add_norm(hidden, _take(hidden), *self.before_attention)
        y = self.attended(y, kwargs)
        if self.after_attention is not None:
            y = add_norm(y, None, *self.after_attention)[1]
        x, y = add_norm(x, y, *self.before_mlp)
        y = self.mlp(y)
        if isinstance(y, tuple):
            y = y[0]
        if self.after_mlp is not None:
            y = add_norm(y, None, *self.after_mlp)[1]
        return x, y

    @classmethod
    def of(
        cls,
        module: nn.Module,
        call: Call,
        calls: dict[nn.Module, Call],
        norms: dict[nn.Module, Any],
        attentions: dict[nn.Module, Callable],
        mlps: dict[nn.Module, Callable],
        family: Operations,
    ) -> Layer | None:
        """Return the form of ``module`` if its children are called in that order and it computes the same."""
        hidden, wanted = call.tensor(), call.output
        if hidden is None or not isinstance(wanted, Tensor) or call.count > 1:
            return None
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return None
        acting = [c for c in module.children() if c in calls and not isinstance(c, (nn.Dropout, nn.Identity))]
        children = sorted(acting, key=lambda c: calls[c].order)
        shape = "".join("n" if c in norms else "a" if c in attentions else "m" for c in children)
        if shape == "nanm":
            first, attending, second, mlp = children
            chosen = [norms[first], None, norms[second], None]
        elif shape == "nannmn":
            first, attending, after, second, mlp, last = children
            chosen = [norms[first], norms[after], norms[second], norms[last]]
        else:
            return None
        # An mlp of another form (experts) is called as it is, and may hold parts with forms of their own.
        replaced = [child for child in children if child is not mlp or mlp in mlps]
        layer = cls(family, attentions[attending], mlps.get(mlp, mlp), chosen, replaced)
        seen = tried(lambda: torch.add(*layer.parts(hidden, call.kwargs)))
        return layer if seen is not None and agree(seen, wanted) else None
