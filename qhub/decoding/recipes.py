"""Recognises parts of a model by experiment: a fused form is taken where it returns what the model's own code returned.

The structure of a module (its children's names, its attributes) only suggests a form. Every suggestion is run on the
arguments of a real call, with every family of operations, and compared with what that call returned. No class is known
by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qhub.decoding.joining import Joined, is_plain
from qhub.decoding.operations import ACTIVATIONS, REFERENCE, NormRule, Operations
from qhub.decoding.trials import Call, agree, tried

__all__ = [
    "Attention",
    "JoinedLayers",
    "State",
    "attention",
    "gated_mlp",
    "norm",
    "projections",
]


@dataclass
class JoinedLayers:
    """Is a list of layers and the one product that computes them all."""

    layers: list[nn.Module]
    product: Joined


@dataclass
class State:
    """Is where a decode step stands, on the device: what fused parts read instead of masks.

    ``position``: int64, the cache's index of this step's token. ``start``: (B,) int64, the first index that is no
    padding. ``cache``: transformers' cache of static layers. ``joined``: joined projections, by the first of them.
    """

    position: Tensor
    start: Tensor
    cache: Any
    joined: dict[nn.Module, JoinedLayers] = field(default_factory=dict)


def norm(module: nn.Module, call: Call) -> tuple[Tensor, NormRule] | None:
    """Return weight and rule when ``module`` is an RMS norm of its input's last dimension."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    x, wanted = call.tensor(), call.first_output()
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float) or x is None or wanted is None:
        return None
    if getattr(module, "bias", None) is not None or x.shape[-1] != weight.shape[0] or _patched(module):
        return None
    best: tuple[float, NormRule] | None = None
    for offset in (0.0, 1.0):
        for early in (True, False):
            rule = NormRule(eps, offset, early)
            seen = REFERENCE.add_norm(x, None, weight, rule)[1]
            if seen.dtype != wanted.dtype or not agree(seen, wanted):
                continue
            error = float((seen.double() - wanted.double()).norm())
            if best is None or error < best[0]:
                best = (error, rule)
    return None if best is None else (weight, best[1])


def _patched(module: nn.Module) -> bool:
    """Return whether somebody put hooks on ``module`` or replaced its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _product(layers: list[nn.Module], state: State) -> Callable[[Tensor], Tensor]:
    """Return the layers' outputs side by side, from one product where their rows stack."""
    if len(layers) == 1:
        return layers[0]
    joined = state.joined.get(layers[0])
    if joined is not None and joined.layers == layers:
        return joined.product
    return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)


def projections(module: nn.Module) -> list[list[nn.Module]]:
    """Return the children of ``module`` that by their names read one input: candidates for joining."""
    groups = []
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        members = [module._modules.get(name) for name in names]
        if all(isinstance(member, nn.Linear) and is_plain(member) for member in members):
            groups.append([member for member in members if member is not None])
    return groups


def gated_mlp(
    module: nn.Module, call: Call, operations: tuple[Operations, ...], state: State
) -> Callable[[Tensor], Tensor] | None:
    """Return a fused form of ``down(activation(gate(x)) * up(x))``."""
    children = module._modules
    down = children.get("down_proj")
    if down is None or call.count > 1 or _patched(module):
        return None
    if children.get("gate_up_proj") is not None:
        inner: list[Any] = [children["gate_up_proj"]]
    else:
        inner = [children.get("gate_proj"), children.get("up_proj")]
    x, wanted = call.tensor(), call.first_output()
    if any(not isinstance(layer, nn.Module) for layer in inner) or x is None or not isinstance(call.output, Tensor):
        return None
    product = _product(inner, state)

    def form(family: Operations, name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: down(family.gate(product(x), name))

    for family in operations:
        for name in ACTIVATIONS:
            fused = form(family, name)
            seen = tried(fused, x)
            if seen is not None and wanted is not None and agree(seen, wanted):
                return fused
    return None


@dataclass
class Attention:
    """Is a fused form of rotary attention over the static cache: hidden states and the call's keywords to its output.

    ``product``: hidden states to queries, keys and values side by side. ``size``: of a head. ``norms``: of
    queries' and keys' heads. ``state``: None where no step is meant.
    """

    module: nn.Module
    product: Callable[[Tensor], Tensor]
    out: nn.Module
    heads: int
    size: int
    norms: tuple[tuple[Tensor, NormRule] | None, ...]
    family: Operations
    scale: float
    window: int | None
    softcap: float | None
    state: State | None

    def __call__(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        assert self.state is not None
        cos, sin = kwargs["position_embeddings"]
        layer = self.state.cache.layers[self.module.layer_idx]  # type: ignore[index]
        flat = self.product(hidden).view(hidden.shape[0], -1)
        mixed = self.family.attend_token(
            flat,
            cos[:, -1],
            sin[:, -1],
            layer.keys,
            layer.values,
            self.state.position,
            self.state.start,
            self.heads,
            self.scale,
            self.window,
            self.softcap,
            *self.norms,
        )
        return self.out(mixed.view(hidden.shape[0], 1, -1))


def attention(
    module: nn.Module,
    call: Call,
    calls: dict[nn.Module, Call],
    operations: tuple[Operations, ...],
    state: State,
) -> Attention | None:
    """Return the fused form of ``module`` if it computes rotary attention."""
    children = module._modules
    out, index = children.get("o_proj"), getattr(module, "layer_idx", None)
    rotary = call.kwargs.get("position_embeddings")
    x, wanted = call.tensor(), call.first_output()
    if out is None or index is None or rotary is None or x is None or wanted is None or _patched(module):
        return None
    if call.count > 1 or not isinstance(rotary, (tuple, list)) or len(rotary) != 2 or rotary[0].ndim != 3:
        return None
    if children.get("qkv_proj") is not None:
        inner: list[Any] = [children["qkv_proj"]]
    else:
        inner = [children.get(name) for name in ("q_proj", "k_proj", "v_proj")]
    layer = state.cache.layers[index]
    keys, values = layer.keys, layer.values
    if any(not isinstance(part, nn.Module) for part in inner) or keys.shape != values.shape:
        return None
    kv_heads, size = keys.shape[1], keys.shape[3]
    width = calls[out].tensor() if out in calls else None
    if width is None or width.shape[-1] % size or (width.shape[-1] // size) % kv_heads:
        return None
    norms: list[tuple[Tensor, NormRule] | None] = []
    for name in ("q_norm", "k_norm"):
        child = children.get(name)
        found = norm(child, calls[child]) if child is not None and child in calls else None
        if child is not None and (found is None or found[0].shape[0] != size):
            return None
        norms.append(found)
    product, heads = _product(inner, state), width.shape[-1] // size
    at = state.position.view(1)
    stored = keys.index_select(2, at), values.index_select(2, at)
    for family in operations:
        for variant in _variants(module, size, keys.shape[2]):
            fused = Attention(module, product, out, heads, size, tuple(norms), family, *variant, state)
            for tensor in (keys, values):
                tensor.index_fill_(2, at, 0.0)
            seen = tried(fused, x, call.kwargs)
            same = seen is not None and agree(seen, wanted)
            same = same and all(agree(t.index_select(2, at), w) for t, w in zip((keys, values), stored, strict=True))
            for tensor, old in zip((keys, values), stored, strict=True):
                tensor.index_copy_(2, at, old)
            if same:
                return fused
    return None


def _variants(module: nn.Module, size: int, capacity: int) -> Iterator[tuple[float, int | None, float | None]]:
    config = getattr(module, "config", None)
    own = getattr(module, "scaling", None)
    scale = float(own) if isinstance(own, (int, float)) else size**-0.5
    windows: dict[int | None, None] = {None: None}
    for source in (module, config):
        window = getattr(source, "sliding_window", None)
        if isinstance(window, int) and window < capacity:
            windows[window] = None
    caps: dict[float | None, None] = {None: None}
    for source in (module, config):
        cap = getattr(source, "attn_logit_softcapping", None)
        if isinstance(cap, (int, float)):
            caps[float(cap)] = None
    for window in windows:
        for cap in caps:
            yield scale, window, cap
