"""The operations of a decode step that models share, in plain torch: what fused kernels must equal, and what runs
where there are none.

Rows are sequences: a decode step feeds one token of each. Plugins offer faster ones through ``qhub_decoding``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qhub.registry import registry

__all__ = ["ACTIVATIONS", "REFERENCE", "NormRule", "Operations", "offered"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class NormRule:
    """Says how an RMS norm computes: ``(weight + offset) * x / sqrt(mean(x^2) + eps)``.

    ``early``: the normalized x is rounded to its own dtype before the weight multiplies it (Llama), not after (Gemma).
    """

    eps: float
    offset: float = 0.0
    early: bool = True


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, rule: NormRule) -> tuple[Tensor, Tensor]:
    """Return ``x + delta`` and its RMS norm over the last dimension, both in x's dtype; ``delta`` None adds nothing."""
    total = x if delta is None else x + delta
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + rule.eps)
    if rule.early:
        wide = wide.to(x.dtype)
        scale = weight + rule.offset if rule.offset else weight
        return total, (scale * wide).to(x.dtype)
    return total, (wide * (weight.float() + rule.offset)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first cos.shape[-1] features of x (B, heads, D), in halves; the others pass."""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return torch.cat((turned, rest), dim=-1)


def rotate_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    heads: int,
    q_norm: tuple[Tensor, NormRule] | None,
    k_norm: tuple[Tensor, NormRule] | None,
) -> Tensor:
    """Rotate the queries and keys of one token a row, write keys and values into the cache, return the queries.

    ``qkv``: (B, (heads + 2 * kv_heads) * D). ``cos``, ``sin``: (B or 1, R), R <= D even. ``keys``, ``values``: (B,
    kv_heads, T, D), written at ``position`` (one int64 on the device). ``q_norm``, ``k_norm``: weight (D,) and rule of
    a norm over each head before it is rotated; None for none. Returns (B, heads, D).
    """
    batch, kv_heads, _, size = keys.shape
    q, k, v = qkv.view(batch, -1, size).split((heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None:
        q = add_norm(q, None, *q_norm)[1]
    if k_norm is not None:
        k = add_norm(k, None, *k_norm)[1]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    at = position.view(1)
    keys.index_copy_(2, at, k[:, :, None].to(keys.dtype))
    values.index_copy_(2, at, v[:, :, None].to(values.dtype))
    return q.contiguous()


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    start: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return softmax(q k^T * scale) v over the cached positions ``start`` <= j <= ``position``.

    ``q``: (B, heads, D); ``keys``, ``values``: (B, kv_heads, T, D), heads a multiple of kv_heads. ``start``: (B,)
    int64, behind a row's padding. ``window``: only the last ``window`` positions, this one included; None: all.
    ``softcap``: scores become softcap * tanh(scores / softcap). Returns (B, heads * D) in q's dtype.
    """
    batch, heads, size = q.shape
    kv_heads, length = keys.shape[1:3]
    grouped = q.view(batch, kv_heads, heads // kv_heads, size)
    scores = torch.matmul(grouped, keys.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(length, device=q.device)
    seen = (place <= position) & (place >= start[:, None])
    if window is not None:
        seen = seen & (place > position - window)
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    weights = scores.softmax(-1).to(q.dtype)
    return torch.matmul(weights, values).reshape(batch, heads * size)


def attend_token(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    start: Tensor,
    heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    q_norm: tuple[Tensor, NormRule] | None,
    k_norm: tuple[Tensor, NormRule] | None,
) -> Tensor:
    """Return one token's attention a row, (B, heads * D): :func:`rotate_store`, then :func:`attend`."""
    q = rotate_store(qkv, cos, sin, keys, values, position, heads, q_norm, k_norm)
    return attend(q, keys, values, position, start, scale, window, softcap)


def gate(gate_up: Tensor, activation: str) -> Tensor:
    """Return ``activation(g) * u`` for ``gate_up`` (..., 2 * I) = [g, u]; ``activation``: a name of
    :data:`ACTIVATIONS`."""
    g, u = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](g) * u


def pick(
    logits: Tensor,
    tokens: Tensor,
    unfinished: Tensor,
    ends: Tensor,
    pad: Tensor,
    text: Tensor,
    position: Tensor,
    finished: Tensor,
) -> None:
    """Choose each row's likeliest token and note it, all in place and without the host.

    ``logits``: (B, vocabulary), of equal ones the first wins. ``tokens``: (B, 1) int64, the chosen ones; ``pad`` (1,)
    for rows that were finished. ``unfinished``: (B,) int64, made 0 where a row's token is among ``ends`` (E,).
    ``text``: (B, T) int64, whose column ``position`` + 1 takes the tokens. ``finished``: int64, set to ``position`` + 1
    when the last row ends; -1 until then.
    """
    chosen = torch.where(unfinished != 0, logits.float().argmax(-1), pad)
    tokens.copy_(chosen[:, None])
    at = position + 1
    text.index_copy_(1, at.view(1), chosen[:, None])
    unfinished.mul_((chosen[:, None] != ends).all(1))
    finished.copy_(torch.where((unfinished.max() == 0) & (finished < 0), at, finished))


_FUNCTIONS = ("add_norm", "attend_token", "gate", "pick")


@dataclass(frozen=True)
class Operations:
    """Is one family of these operations, with the contracts of this module's functions."""

    name: str
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    attend_token: Callable[..., Tensor]
    gate: Callable[..., Tensor]
    pick: Callable[..., None]


REFERENCE = Operations("torch", add_norm, attend_token, gate, pick)


@cache
def offered(device: str) -> tuple[Operations, ...]:
    """Return the families for a device type, plugins' first; the torch one is always the last."""
    found: list[Operations] = []
    for name, answer in registry.broadcast("qhub_decoding", device=device):
        functions = {key: _load(path) for key, path in answer.items() if key in _FUNCTIONS}
        found.append(Operations(name, **{key: functions.get(key, getattr(REFERENCE, key)) for key in _FUNCTIONS}))
    return (*found, REFERENCE)


def _load(path: str) -> Callable[..., Any]:
    from qhub.kernels import KernelSpec

    return KernelSpec.load(path)
