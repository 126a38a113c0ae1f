"""Applies the input scales that a method chooses to one group of layers: in the operation before them where that
changes nothing else, otherwise in the layers' own layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qhub.calibration.collecting import Enough
from qhub.calibration.folding import Producer, executed, find_producer, tolerance
from qhub.calibration.products import Key, features_of
from qhub.calibration.stacks import Call
from qhub.errors import QhubError
from qhub.registry import registry

if TYPE_CHECKING:
    from qhub.calibration.block import BlockWork

__all__ = ["equalize_group"]


def equalize_group(
    work: BlockWork,
    group: Sequence[Key],
    planned: Sequence[Key],
    statistics: dict[str, Tensor],
) -> Tensor | None:
    """Ask the method for input scales of ``planned`` and apply them; return those that the input is divided by.

    None where the method wants none, or where the layouts carry them: then the input itself stays as it is.
    """
    call, inputs = _call_that_reaches(work, group[0])
    producer = None
    # An input that is made several times, or for one expert of several, has no one producer.
    if call is not None and len(inputs) == 1 and group[0].expert is None:
        producer = _producer(work, group[0], call, inputs[0])
    scales = _ask(work, planned, statistics, None if producer is None else producer.tied)
    if scales is None:
        return None
    if producer is not None:
        assert call is not None
        for offset in (False, True) if producer.may_offset else (False,):
            applied = _folded(work, group, producer, scales, call, offset)
            if applied is not None:
                return applied
        # Nothing before the layers takes the scales: ties bind nobody.
        if producer.tied is not None:
            scales = _ask(work, planned, statistics, None)
            if scales is None:
                return None
    for key in planned:
        work.scales[key] = scales
    return None


def _ask(work: BlockWork, planned: Sequence[Key], statistics: dict[str, Tensor], tied: Tensor | None) -> Tensor | None:
    features = int(work.matrix(planned[0]).shape[1])
    scales = registry.call(
        work.quantization.method,
        "qhub_equalize",
        config=work.quantization.config,
        weights={str(key): work.matrix(key) for key in planned},
        layouts={str(key): work.plans[key.name].layout for key in planned},
        statistics=statistics,
        tied=tied,
    )
    if scales is None:
        return None
    if scales.shape != (features,) or not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise QhubError(
            f"{planned[0]}: {work.quantization.method} chose input scales of shape {tuple(scales.shape)}; expected "
            f"({features},), finite and above zero"
        )
    return scales.float()


def _call_that_reaches(work: BlockWork, key: Key) -> tuple[Call | None, list[Tensor]]:
    """Return the first call of the block in which ``key`` has inputs, and these."""
    for _, call, _ in work.calls():
        inputs = _inputs(work, key, call)
        if inputs:
            return call, inputs
    return None, []


def _inputs(work: BlockWork, key: Key, call: Call, follow: bool = False) -> list[Tensor]:
    """Return the inputs of ``key`` in one run, (tokens, K) each; with ``follow`` those of every matrix of the block."""
    found: list[Tensor] = []

    def seen(other: Key, x: Tensor) -> None:
        if follow or other == key:
            found.append(features_of(x))

    work.observe(call, seen)
    return found


def _producer(work: BlockWork, key: Key, call: Call, x: Tensor) -> Producer | None:
    """Return what makes ``x``, the input of ``key`` in ``call``."""

    def stop(other: Key, x: Tensor) -> None:
        if other == key:
            raise Enough

    before = executed(work.module, lambda: work.observe(call, stop))
    return find_producer(before, x, lambda: _inputs(work, key, call)[0])


def _folded(
    work: BlockWork, group: Sequence[Key], producer: Producer, scales: Tensor, call: Call, offset: bool
) -> Tensor | None:
    """Divide the producer, multiply the group's columns, and return the scales applied; None, and all undone, if the
    block then computes anything else."""
    before = _inputs(work, group[0], call, follow=True)
    columns = {key: work.matrix(key).clone() for key in group}
    ours = set(group)
    try:
        with producer.divided(scales, offset, work.storage_dtype) as applied:
            for key in group:
                work.matrix(key).mul_(applied)
            after: list[Tensor] = []

            def seen(key: Key, x: Tensor) -> None:
                after.append(features_of(x) * applied if key in ours else features_of(x))

            work.observe(call, seen)
            allowed = tolerance(before[0].dtype)
            for one, other in zip(before, after, strict=True):
                power = one.float().square().sum()
                if float((one.float() - other.float()).square().sum()) > allowed**2 * float(power):
                    raise _Differs
            return applied
    except (_Differs, ValueError):
        # ValueError: the block made other products than before, so other tokens went to other experts.
        for key, column in columns.items():
            work.matrix(key).copy_(column)
        return None


class _Differs(Exception):
    """Says that folding changed what the block computes."""
