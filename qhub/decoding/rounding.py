"""Tells what fused parts of a whole model round elsewhere from what they compute wrongly.

Parts in another form round elsewhere. In a deep model what that changes grows from layer to layer, in one with large
weights by orders of magnitude, so no fixed bound tells a wrong form from a right one. The model itself does: by how far
one more rounding of every part's output moves what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qhub.decoding.trials import difference, tolerance

__all__ = ["disagreement", "rounded_outputs"]

Results = Mapping[str, Tensor]

# What a whole model computes may always differ by that many times what one part may: some hundred roundings add up.
_SLACK = {torch.bfloat16: 3.0, torch.float16: 8.0}
# How many times what one more rounding of every part moves a result by it may differ, but no more than half its length:
# results that have nothing to do with each other are 1.4 lengths apart.
_ROUNDINGS, _MOST = 3.0, 0.5


def disagreement(model: nn.Module, found: Results, wanted: Results, again: Callable[[], Results]) -> str | None:
    """Return how ``found``, by fused parts, is not ``wanted``, by the model's own code; None: they are as good.

    Both: results by name, the same names. ``again``: has the model's own code compute them once more; asked only where
    a fixed bound is passed, to measure how far roundings move those results.
    """
    beyond = {}
    for name, own in wanted.items():
        seen = found[name]
        if seen.shape != own.shape or seen.dtype != own.dtype:
            return f"{name} are {seen.dtype} {tuple(seen.shape)}, not {own.dtype} {tuple(own.shape)}"
        error = difference(seen, own)
        if not error <= _fixed(own.dtype):
            beyond[name] = error
    if not beyond:
        return None
    with rounded_outputs(model):
        moved = again()
    worst, reason = 1.0, None
    for name, error in beyond.items():
        own = wanted[name]
        by = difference(moved[name], own)
        # Where roundings lead to no number they say nothing.
        bound = max(_fixed(own.dtype), min(_ROUNDINGS * by, _MOST) if math.isfinite(by) else 0.0)
        share = error / bound if math.isfinite(error) else math.inf
        if share > worst:
            worst = share
            reason = (
                f"{name} differ by {error:.2g} of their length, more than {bound:.2g}; "
                f"one more rounding of every part moves them by {by:.2g}"
            )
    return reason


def _fixed(dtype: torch.dtype) -> float:
    """Return how far results of ``dtype`` may differ in any model, as a share of their length."""
    return _SLACK.get(dtype, 10.0) * tolerance(dtype)


@contextmanager
def rounded_outputs(model: nn.Module) -> Iterator[None]:
    """Within: outputs of modules without children are off by up to half a unit in their last place, the same each time.

    Numbers of torch's own generators are not used up.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def rounded(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        generator = generators.get(output.device)
        if generator is None:
            generator = generators[output.device] = torch.Generator(output.device).manual_seed(0)
        # In float64, where a factor so near 1 is not lost.
        noise = torch.rand(output.shape, generator=generator, device=output.device, dtype=torch.float64)
        off = 1.0 + (noise - 0.5) * torch.finfo(output.dtype).eps
        return (output.double() * off).to(output.dtype)

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    hooks = [module.register_forward_hook(rounded) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
