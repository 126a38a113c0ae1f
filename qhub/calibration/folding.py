"""Finds the operation before a layer by experiment, and moves input scales into it.

Multiplying each output channel c of an earlier module by a number f_c of its own, and looking at the layer's input:
when every feature k of it comes out multiplied by one of these numbers, f_m(k), the way between is linear channel by
channel, and m is the map, query heads that share a value head and halves of a fused projection included. Dividing
channel m(k) by s_k is then the same as dividing feature k. So no table of architectures is needed (Lin et al. 2023,
"AWQ", section 3.2, folds by such tables).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Producer", "executed", "find_producer"]

# Relative errors of two ways to compute the same numbers: far above rounding, far below what a wrong map gives.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Producer:
    """Is a module whose output channel ``channels[k]`` alone makes feature k: ``channels`` (K,) int64."""

    name: str
    module: nn.Module
    channels: Tensor

    @property
    def tied(self) -> Tensor | None:
        """Return ``channels`` where one stands for several features; None when each has its own."""
        return self.channels if self.channels.unique().numel() < self.channels.numel() else None

    @contextmanager
    def divided(self, scales: Tensor, offset: bool, dtype: torch.dtype) -> Iterator[Tensor]:
        """Divide the channels by ``scales`` (K,), and give the scales that the channels were really divided by.

        They differ by rounding: a norm's weight is kept in ``dtype``, so it is rounded to it at once. ``offset``: the
        module multiplies by 1 + weight, as some norms do. All is undone if the context ends with an exception.
        """
        kept = {name: parameter.data.clone() for name, parameter in self.module.named_parameters(recurse=False)}
        weight = kept["weight"]
        channels = self.channels.to(weight.device)
        factor = torch.ones(_channel_count(self.module), device=weight.device)
        factor[channels] = 1 / scales.to(weight.device)
        one = 1.0 if offset else 0.0
        changed = {}
        for name, value in kept.items():
            by = factor[:, None] if value.ndim == 2 and not _is_transposed(self.module) else factor
            shift = one if name == "weight" else 0.0
            changed[name] = (value.float() + shift) * by - shift
            if value.ndim == 1:
                changed[name] = changed[name].to(dtype).float()
        if weight.ndim == 1:
            before, after = weight.float() + one, changed["weight"] + one
            exact = (before != 0) & (after != 0)
            factor = torch.where(exact, after / torch.where(exact, before, 1.0), factor)
        try:
            for name, parameter in self.module.named_parameters(recurse=False):
                parameter.data.copy_(changed[name])
            yield (1 / factor)[channels]
        except BaseException:
            for name, parameter in self.module.named_parameters(recurse=False):
                parameter.data.copy_(kept[name])
            raise

    @property
    def may_offset(self) -> bool:
        """Return whether the module may multiply by 1 + weight."""
        weight = self.module.weight
        return isinstance(weight, Tensor) and weight.ndim == 1


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that computing in ``dtype`` explains."""
    return _TOLERANCE.get(dtype, 1e-3)


def executed(block: nn.Module, run: Callable[[], object]) -> list[tuple[str, nn.Module]]:
    """Return the modules of ``block`` that could take scales, in the order in which ``run()`` ends them."""
    order: list[tuple[str, nn.Module]] = []
    hooks = [
        module.register_forward_hook(lambda m, a, o, name=name: order.append((name, m)))
        for name, module in block.named_modules()
        if _channel_count(module)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return order


def find_producer(
    candidates: list[tuple[str, nn.Module]], x: Tensor, probe: Callable[[], Tensor], limit: int = 4
) -> Producer | None:
    """Return the module that makes the features of ``x``, the nearest before it; None if there is none.

    ``candidates``: modules run before ``x`` was there, in order. ``x``: (tokens, K). ``probe()``: runs the block again
    and returns what ``x`` becomes. ``limit``: how many candidates are tried.
    """
    seen: set[nn.Module] = set()
    tried = 0
    for name, module in reversed(candidates):
        # A module that runs twice makes more than this input.
        if module in seen or sum(m is module for _, m in candidates) > 1:
            continue
        seen.add(module)
        if tried == limit:
            return None
        tried += 1
        channels = _channels(module, x, probe)
        if channels is not None:
            return Producer(name, module, channels)
    return None


def _channels(module: nn.Module, x: Tensor, probe: Callable[[], Tensor]) -> Tensor | None:
    count = _channel_count(module)
    for start, stop in _slices(x.shape[1], count):
        channels = _channels_within(module, x, probe, count, start, stop)
        if channels is not None:
            return channels
    return None


def _channels_within(
    module: nn.Module, x: Tensor, probe: Callable[[], Tensor], count: int, start: int, stop: int
) -> Tensor | None:
    """Return the map if channels ``start`` to ``stop`` alone make ``x``; the others are left as they are."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.ones(count)
    # Between 1/2 and 2, evenly on a logarithmic scale, in random order.
    spread = torch.linspace(-1, 1, stop - start).exp2()
    factors[start:stop] = spread[torch.randperm(stop - start, generator=generator)]
    factors = factors.to(x.device)
    handle = module.register_forward_hook(lambda m, a, output: output * factors.to(output.dtype))
    try:
        changed = probe()
    finally:
        handle.remove()
    if changed.shape != x.shape:
        return None
    before, after = x.float(), changed.float()
    energy = before.square().sum(0)
    alive = energy > 0
    ratio = (before * after).sum(0) / torch.where(alive, energy, 1.0)
    left = (after - ratio * before).square().sum(0).sqrt() / torch.where(alive, energy, 1.0).sqrt()
    allowed = tolerance(x.dtype)
    if not bool(alive.any()) or bool((left[alive] > allowed).any()):
        return None
    for channels in _maps(x.shape[1], start, stop):
        expected = factors[channels.to(x.device)]
        if bool(((ratio - expected).abs()[alive] <= allowed * expected[alive]).all()):
            return channels.to(x.device)
    return None


def _slices(features: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a module's channels that may make ``features``: all, or the last or first of several."""
    if count <= features:
        yield 0, count
        return
    for repeats in (1, 2, 4, 8):
        size = features // repeats
        # Gate and up; query, key and value, the latter two with fewer heads.
        if features % repeats == 0 and (count == 2 * size or count == features + 2 * size):
            yield count - size, count
            yield 0, size


def _maps(features: int, start: int, stop: int) -> Iterator[Tensor]:
    """Yield the maps from features to channels ``start`` to ``stop`` that models use: each once, or heads repeated."""
    place, size = torch.arange(features), stop - start
    if features % size:
        return
    repeats = features // size
    widths = [size] if repeats == 1 else [width for width in range(4, min(size, 512) + 1) if size % width == 0]
    for width in widths:
        yield start + place // (repeats * width) * width + place % width


def _is_transposed(module: nn.Module) -> bool:
    # GPT-2's layer keeps (in, out) and says so by `nf`.
    return hasattr(module, "nf")


def _channel_count(module: nn.Module) -> int:
    """Return how many output channels the module's own weight has; 0 when it is no module that could take scales."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or isinstance(module, nn.Embedding):
        return 0
    if weight.ndim == 1:
        return weight.shape[0]
    if weight.ndim == 2:
        return weight.shape[1] if _is_transposed(module) else weight.shape[0]
    return 0
