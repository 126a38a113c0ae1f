"""Tries how far one more rounding of every part's output moves what a model computes.

Parts in another form round elsewhere. In a deep model what that changes grows from layer to layer, in one with large
weights by orders of magnitude, so no fixed bound tells a wrong form from a right one; the model itself does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["rounded_outputs"]


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
