"""Finds the blocks of a model, and what enters each of them.

A *stack* is an ``nn.ModuleList`` whose members hold weights to quantize: the layers of a decoder, an encoder, a vision
tower. What enters block i of it is found by running the model itself, with every block before i answering at once with
what block i-1 returned, and block i ending the run: masks, positions, a bias that the first block makes for all, the
encoder's output all arrive as the model hands them over, and no table of architectures is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qhub.errors import UnsupportedError

__all__ = ["Call", "Stack", "entering", "find_stacks", "first_reached", "loose_weights", "through"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Stack:
    """Is a list of blocks that run one after the other: ``name`` in the model, ``blocks`` by name."""

    name: str
    blocks: Mapping[str, nn.Module]


def find_stacks(model: nn.Module, weights: Iterable[str]) -> list[Stack]:
    """Return the outermost module lists that hold any of the parameters ``weights``."""
    names = list(weights)
    found: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{s.name}.") for s in found):
            continue
        # The list of experts of a block without a list around it runs its members side by side: no stack.
        if any(weight.startswith(f"{name}.") for weight in names) and len(module):
            found.append(Stack(name, {f"{name}.{index}": block for index, block in enumerate(module)}))
    return found


def loose_weights(stacks: Iterable[Stack], weights: Iterable[str]) -> list[str]:
    """Return the parameters that lie in no stack."""
    prefixes = tuple(f"{stack.name}." for stack in stacks)
    return [name for name in weights if not name.startswith(prefixes)] if prefixes else list(weights)


class _Reached(BaseException):
    """Ends a run of the model at the block that was asked for; no ``except Exception`` on the way may catch it."""

    def __init__(self, what: Any) -> None:
        self.what = what
        super().__init__()


@contextmanager
def _answers(answers: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace ``forward`` of each module while the context lasts."""
    before = {module: module.__dict__.get("forward") for module in answers}
    try:
        for module, answer in answers.items():
            module.forward = answer
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _reach(key: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise _Reached((key, args, kwargs))

    return forward


def _return(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _until(places: list[int], index: int, previous: Any, stack: Stack) -> Callable[..., Any]:
    """Return a forward for a block at ``places`` of its stack (several, if layers are shared), which answers with
    ``previous`` before place ``index`` and ends the run there."""
    calls = iter(places)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if next(calls, index) < index:
            return previous
        raise _Reached((stack, args, kwargs))

    return forward


def _run(model: nn.Module, sample: Mapping[str, Any]) -> Any:
    """Run the model; return what a block that ends the run was called with, None when it ran to its end."""
    try:
        with torch.no_grad():
            model(**sample)
    except _Reached as reached:
        return reached.what
    return None


def _finished(stacks: Iterable[tuple[Stack, Any]]) -> dict[nn.Module, Callable[..., Any]]:
    return {block: _return(output) for stack, output in stacks for block in stack.blocks.values()}


def first_reached(
    model: nn.Module, sample: Mapping[str, Any], done: Iterable[tuple[Stack, Any]], waiting: Iterable[Stack]
) -> Stack | None:
    """Return which of the stacks ``waiting`` the model comes to first; None if ``sample`` reaches none of them.

    ``done``: finished stacks with what their last block returned for this sample.
    """
    answers = _finished(done)
    answers |= {block: _reach(stack) for stack in waiting for block in stack.blocks.values()}
    with _answers(answers):
        reached = _run(model, sample)
    return None if reached is None else reached[0]


def entering(
    model: nn.Module,
    sample: Mapping[str, Any],
    done: Iterable[tuple[Stack, Any]],
    stack: Stack,
    index: int,
    previous: Any,
) -> Call | None:
    """Return what block ``index`` of ``stack`` is called with; None if this sample does not come to it.

    ``previous``: what the block before it returned for this sample; of no meaning for the first.
    """
    answers = _finished(done)
    places: dict[nn.Module, list[int]] = {}
    for place, block in enumerate(stack.blocks.values()):
        places.setdefault(block, []).append(place)
    for block, own in places.items():
        if own[0] <= index:
            answers[block] = _until(own, index, previous, stack)
    with _answers(answers):
        reached = _run(model, sample)
    if reached is None:
        if index:
            raise UnsupportedError(
                f"{stack.name}: the model ended before its block {index}, though it ran the blocks before: blocks that "
                "are left out at random (layerdrop) cannot be calibrated; turn that off in the model's config"
            )
        return None
    return reached[1], reached[2]


def through(model: nn.Module, sample: Mapping[str, Any], done: Iterable[tuple[Stack, Any]]) -> None:
    """Run the model to its end, with every stack answering what its last block returned for this sample."""
    with _answers(_finished(done)), torch.no_grad():
        model(**sample)
