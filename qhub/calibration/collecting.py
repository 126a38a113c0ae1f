"""Collects the statistics of a block's inputs: runs the block, watches its products, adds up."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qhub.calibration import sharing
from qhub.calibration.products import Key, Products, features_of
from qhub.calibration.stacks import Call
from qhub.calibration.statistics import Sums, neutral
from qhub.errors import CheckpointError

if TYPE_CHECKING:
    from qhub.calibration.block import BlockWork

__all__ = ["Collector", "Enough", "Stage", "matrices_of"]


class Enough(BaseException):
    """Ends a run of the block where nothing more is to be seen."""


@dataclass
class Stage:
    """Is what one pass looks at: groups of matrices with a common input, or all experts of one parameter."""

    groups: list[list[Key]]
    experts: bool = False

    def leaders(self) -> dict[Key, int]:
        """Return the first matrix of each group, with the group's number."""
        return {group[0]: number for number, group in enumerate(self.groups)}


class Collector:
    """Collects for one block. ``original``: its unquantized copy, where the method asks for that stream too.

    ``repeats``: whether the block uses a matrix more than once, so that no run of it may be cut short.
    """

    def __init__(self, work: BlockWork) -> None:
        # Weak, so that a block's weights go as soon as it is done, not when cycles are collected.
        self._work = weakref.proxy(work)
        self.original: nn.Module | None = None
        self.repeats = False

    def collect(self, stages: Sequence[Stage]) -> list[dict[int, dict[str, Tensor]]]:
        """Return {group number: statistics} for each of ``stages`` from one pass over the calls."""
        leaders = {key: (s, g) for s, stage in enumerate(stages) for key, g in stage.leaders().items()}
        groups = {(s, g): group for s, stage in enumerate(stages) for g, group in enumerate(stage.groups)}
        stops = not self.repeats and not any(stage.experts for stage in stages)
        wanted = {key for stage in stages for group in stage.groups for key in group}
        sums = {
            place: Sums(self._work.names, self._work.features(group), self._work.device)
            for place, group in groups.items()
        }
        # A run that ends with the last input of one group needs none of the group's products.
        idle = frozenset(key for key in wanted if key.name in self._work.plans) if stops and len(groups) == 1 else ()
        for number, call, float_call in self._work.calls():
            floats = self._float_inputs(float_call, leaders)
            counts = dict.fromkeys(leaders, 0)
            remaining = set(wanted)

            def seen(key: Key, x: Tensor) -> None:
                if key in leaders:
                    others = floats.get(key)  # noqa: B023
                    use = counts[key]  # noqa: B023
                    counts[key] += 1  # noqa: B023
                    flat = features_of(x)
                    other = features_of(others[use]) if others is not None and use < len(others) else None
                    # Other experts may have got a token in the unquantized model: then the two inputs cannot be paired.
                    paired = other if other is not None and other.shape == flat.shape else flat
                    sums[leaders[key]].add(flat, paired)
                remaining.discard(key)  # noqa: B023
                if stops and not remaining:  # noqa: B023
                    raise Enough

            self._work.observe(call, seen, number, idle)
        result: list[dict[int, dict[str, Tensor]]] = [{} for _ in stages]
        for key, (stage, group) in leaders.items():
            one = sums.pop((stage, group))
            sharing.reduce_sums(one)
            result[stage][group] = self._means(key, one, self._work.features(groups[stage, group]))
        return result

    def _means(self, key: Key, sums: Sums, features: int) -> dict[str, Tensor]:
        values = sums.means()
        for name, value in values.items():
            if name != "tokens" and not bool(torch.isfinite(value).all()):
                self._locate(key, name)
        enough = self._work.options.min_tokens if key.expert is not None else 1
        if sums.tokens >= enough:
            return values
        kind = "this expert" if key.expert is not None else "this layer"
        self._work.warn(
            f"{key}: {kind} saw {sums.tokens} tokens of the calibration, fewer than {enough}: its weights are rounded "
            "as if all inputs were alike. More or more varied samples would help"
        )
        return neutral(self._work.names, features, self._work.device)

    def _locate(self, key: Key, name: str) -> None:
        """Raise an error that says in which sample the input of ``key`` is not finite."""
        for batch, call, _ in self._work.calls():
            bad: list[int] = []

            def seen(other: Key, x: Tensor) -> None:
                if other == key and not bool(torch.isfinite(x).all()):
                    first = x.reshape(x.shape[0], -1) if x.ndim > 1 else x[None]
                    bad.append(int((~torch.isfinite(first)).any(-1).nonzero()[0]))  # noqa: B023

            self._work.observe(call, seen)
            if bad:
                raise CheckpointError(
                    f"{key}: its input holds NaN or infinity in calibration sample {bad[0]} of batch {batch}: the "
                    "model overflows in this dtype, or its weights are damaged"
                )
        raise CheckpointError(
            f"{key}: the statistic {name!r} of its inputs overflows float32: the inputs are too large"
        )

    def _float_inputs(self, call: Call | None, leaders: Mapping[Key, Any]) -> dict[Key, list[Tensor]]:
        if call is None or self.original is None:
            return {}
        found: dict[Key, list[Tensor]] = {}

        def seen(key: Key, x: Tensor) -> None:
            if key in leaders:
                found.setdefault(key, []).append(x)

        with Products(matrices_of(self.original, self._work.prefix), seen):
            self._work.run(self.original, call)
        return found


def matrices_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the dense matrices of ``module`` by the names they have in the model, ``prefix`` being the module's."""
    lead = f"{prefix}." if prefix else ""
    return {
        lead + name: parameter
        for name, parameter in module.named_parameters()
        if parameter.ndim in (2, 3) and parameter.is_floating_point() and parameter.device.type != "meta"
    }
