"""Looks a model over before each call, quickly: has anything changed that a captured step has in it?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qhub.decoding.joining import pointers
from qhub.tensor import QuantizedTensor

__all__ = ["Survey", "survey"]


class Survey:
    """Is what one walk over a model found.

    ``mark``: a number that changes with modules, memory of weights and settings of adapters. ``patched``: a module with
    hooks or a forward of its own, None if there is none. ``devices``: those of the weights. ``quantized``: whether one
    of them is.
    """

    def __init__(self, mark: int, patched: nn.Module | None, devices: set[torch.device], quantized: bool):
        self.mark, self.patched, self.devices, self.quantized = mark, patched, devices, quantized


def survey(model: nn.Module) -> Survey:
    """Walk over ``model``."""
    seen: list[Any] = []
    patched = None
    devices = set()
    quantized = False
    # Not modules(): names and memos would cost ten times as much.
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        seen.append(id(module))
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            patched = module
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if type(parameter) is QuantizedTensor:
                quantized = True
                devices.add(next(iter(parameter.parts.values())).device)
            else:
                devices.add(parameter.device)
            seen += pointers(parameter)
        if "merged_adapters" in module.__dict__:
            # A tuner layer of PEFT: what its forward decides on the host.
            tuner: Any = module
            seen.append(repr((tuner.active_adapters, tuner.disable_adapters, tuner.merged_adapters)))
            seen.append(repr(getattr(tuner, "scaling", None)))
        waiting += [child for child in module._modules.values() if child is not None]
    return Survey(hash(tuple(seen)), patched, devices, quantized)
