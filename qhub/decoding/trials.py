"""Records what the parts of a model were called with, and tells whether a suggested form returns the same."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Call", "agree", "calls_of", "difference", "tolerance", "tried"]

logger = logging.getLogger("qhub")

# Relative Frobenius error of one part in the model's dtype; both sides round their intermediate results in it.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}


@dataclass
class Call:
    """Is one recorded call of a module: its arguments, its output, its place among all calls."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    order: int
    count: int = field(default=1)

    def tensor(self) -> Tensor | None:
        """Return the first argument, by place or as ``hidden_states``."""
        value = self.args[0] if self.args else self.kwargs.get("hidden_states")
        return value if isinstance(value, Tensor) else None

    def first_output(self) -> Tensor | None:
        """Return the output, or the first member of it."""
        value = self.output[0] if isinstance(self.output, tuple) and self.output else self.output
        return value if isinstance(value, Tensor) else None


@contextlib.contextmanager
def calls_of(model: nn.Module) -> Iterator[dict[nn.Module, Call]]:
    """Record the calls of every module within; a module called twice is marked by its ``count``."""
    found: dict[nn.Module, Call] = {}
    order = iter(range(1 << 30))
    entered: dict[nn.Module, int] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered[module] = next(order)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module in found:
            found[module].count += 1
        else:
            found[module] = Call(args, kwargs, output, entered[module])

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Return whether two results of one part are equal up to the rounding of their dtype."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return difference(found, wanted) <= tolerance(wanted.dtype)


def tolerance(dtype: torch.dtype) -> float:
    """Return how far two results of one part may differ, as a share of their length."""
    return _TOLERANCE.get(dtype, 1e-4)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return how far ``found`` is from ``wanted``, as a share of its length; not a number where either holds none."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def tried(run: Callable[..., Tensor], *arguments: Any) -> Tensor | None:
    """Return what a suggested form returns; None where it does not fit the module's shapes."""
    try:
        return run(*arguments)
    except Exception as error:
        # A kernel's compiler may raise anything; the model's own code is there.
        logger.debug("qhub: a suggested form of a decode step is left out: %s: %s", type(error).__name__, error)
        return None
