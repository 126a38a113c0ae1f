"""Helps tuners that need more of a base layer than a float weight to read: its exact type, the gradient of its weight,
or a copy that can be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from qhub.integrations.peft.dense import dense_weights, quantized_weights
from qhub.modules import QuantLinear
from qhub.tensor import QuantizedTensor

__all__ = ["copies_are_dense", "entries_are_dense", "plain", "with_dense_weights"]


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Let quantized layers be of the very type ``nn.Linear`` for a block: some tuners take no subclass of it.

    A :class:`QuantLinear` has nothing of its own but a shorter way to its kernel.
    """
    layers = [module for module in model.modules() if type(module) is QuantLinear]
    for layer in layers:
        layer.__class__ = nn.Linear  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = QuantLinear


def with_dense_weights(model: nn.Module, original: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    """Give the targets dense weights while their gradients are taken: as large as the gradients themselves."""
    from peft.tuners.lora.loraga import get_target_modules

    with ExitStack() as stack:
        for _, layer in list(get_target_modules(model, config)):
            stack.enter_context(dense_weights(layer, quantized_weights(layer)))
        return original(config, *args, **kwargs)


def copies_are_dense(wrapper: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let modules_to_save hold a dense copy of a quantized module: that is the one which is trained."""
    with ExitStack() as stack:
        for layer in wrapper.original_module.modules():
            stack.enter_context(dense_weights(layer, quantized_weights(layer)))
        return original(*args, **kwargs)


def entries_are_dense(model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Let an adapter file hold dense tensors: PEFT puts the weight of a targeted output head or embedding into it."""
    entries = original(*args, **kwargs)
    return {n: v.dequantize() if isinstance(v, QuantizedTensor) else v for n, v in entries.items()}
