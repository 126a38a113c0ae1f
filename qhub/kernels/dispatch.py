"""Chooses the kernel of a layer: filter once, keep every reason, admit only what matches the reference.

The choice is made per (layout, device, dtype) and kept; at run time it is one comparison of M. ``QHUB_KERNEL=name``
forces a kernel and never falls back.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qhub.errors import KernelError
from qhub.kernels import reference, scaled_mm
from qhub.kernels.spec import KernelSpec, Problem
from qhub.layouts import Layout, Parts
from qhub.registry import registry

__all__ = ["REFERENCE", "Choice", "choose", "forget", "kernels", "resolve"]

REFERENCE = "reference"
# Rows of a tall matrix that are compared with the reference in one piece.
_BAND = 1024

# Relative Frobenius error up to which a kernel counts as equal to the reference. Both round their output once to the
# input's dtype (half an ulp each: 2^-9 for bf16, 2^-12 for fp16) and may round the weight to it too; 2^-6 and 2^-9
# leave a factor of four. An int8 activation rounds x to 1/254 of its absmax in both, so that rounding cancels.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6, torch.float64: 1e-6}

LinearFunction = Callable[[Tensor, Layout, Parts, "Tensor | None"], Tensor]


@dataclass
class Choice:
    """Is the answer for one layer: kernels by rising M, and why the others were refused.

    ``steps``: (largest M, kernel name, function), the last without a limit. ``refused``: {kernel name: reason}.
    """

    problem: Problem
    steps: list[tuple[float, str, LinearFunction]]
    refused: dict[str, str] = field(default_factory=dict)

    def pick(self, m: int) -> LinearFunction:
        """Return the function for inputs of ``m`` rows."""
        for limit, _, function in self.steps:
            if m <= limit:
                return function
        return self.steps[-1][2]

    def name(self, m: int) -> str:
        """Return the name of the kernel for inputs of ``m`` rows."""
        return next(name for limit, name, _ in self.steps if m <= limit)


# Raised by forget(): choices remembered elsewhere under an older number are void.
epoch = 0

_lock = threading.RLock()
_offered: dict[str, KernelSpec] | None = None
_choices: dict[tuple[Problem, str | None], Choice] = {}


def kernels() -> dict[str, KernelSpec]:
    """Return every kernel of the core or of an installed plugin, by name; asked once per process.

    A name offered twice is refused the second time, with a warning.
    """
    global _offered
    with _lock:
        if _offered is None:
            # Those of the core are for GPUs; elsewhere they would only be one more reason to read.
            offered: dict[str, KernelSpec] = {scaled_mm.SPEC.name: scaled_mm.SPEC} if torch.cuda.is_available() else {}
            for plugin, specs in registry.broadcast("qhub_kernels"):
                for spec in specs:
                    if spec.name in offered or spec.name == REFERENCE:
                        warnings.warn(
                            f"the plugin {plugin!r} offers a kernel named {spec.name!r}, a name that is taken: left "
                            "out",
                            stacklevel=2,
                        )
                        continue
                    offered[spec.name] = spec
            _offered = offered
        return _offered


def forget() -> None:
    """Drop offers and choices, so that plugins installed or kernels registered since are seen."""
    global _offered, epoch
    with _lock:
        _offered = None
        _choices.clear()
        epoch += 1


def choose(layout: Layout, parts: Parts, dtype: torch.dtype) -> Choice:
    """Return the kernels for a layer with ``parts`` and inputs of ``dtype``; decided once, then looked up.

    Raises :class:`KernelError` when ``QHUB_KERNEL`` names a kernel that does not exist or cannot run here.
    """
    device = next(iter(parts.values())).device
    problem = Problem(layout, device.type, dtype)
    forced = os.environ.get("QHUB_KERNEL") or None
    with _lock:
        choice = _choices.get((problem, forced))
        if choice is None:
            choice = resolve(problem, parts, forced)
            # A meta device decides nothing: values are missing to compare with the reference.
            if device.type != "meta":
                _choices[problem, forced] = choice
        return choice


def resolve(problem: Problem, parts: Parts, forced: str | None = None) -> Choice:
    """Filter all kernels for ``problem``, compare the rest with the reference on ``parts``, and order them by M."""
    refused: dict[str, str] = {}
    admitted: list[tuple[KernelSpec, LinearFunction]] = []
    if forced is not None and forced != REFERENCE and forced not in kernels():
        raise KernelError(f"QHUB_KERNEL={forced}: no such kernel; there are {[REFERENCE, *kernels()]}")
    for spec in kernels().values():
        if forced is not None and spec.name != forced:
            refused[spec.name] = f"QHUB_KERNEL={forced}"
            continue
        try:
            reason = spec.refusal(problem)
            function = spec.function() if reason is None else None
            if function is not None and problem.device != "meta":
                reason = _disagreement(function, problem, parts)
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {error}"
            if forced is None:
                warnings.warn(f"the kernel {spec.name!r} {reason}; another one is used", RuntimeWarning, stacklevel=3)
        if reason is not None:
            refused[spec.name] = reason
        elif function is not None:
            admitted.append((spec, function))
    if forced is not None and forced in refused:
        raise KernelError(f"QHUB_KERNEL={forced}: {refused[forced]} (layout {problem.layout.describe()})")
    return Choice(problem, _steps(admitted, forced), refused)


def _steps(
    admitted: list[tuple[KernelSpec, LinearFunction]], forced: str | None
) -> list[tuple[float, str, LinearFunction]]:
    steps: list[tuple[float, str, LinearFunction]] = []
    reached = 0.0
    unlimited = float("inf")
    candidates = sorted(admitted, key=lambda item: -item[0].rank)
    while reached < unlimited:
        able = [(spec, run) for spec, run in candidates if (spec.max_m or unlimited) > reached]
        if not able:
            break
        spec, run = able[0]
        reached = spec.max_m or unlimited
        if forced is not None:
            reached = unlimited
        steps.append((reached, spec.name, run))
    if not steps or steps[-1][0] < unlimited:
        steps.append((unlimited, REFERENCE, reference.linear))
    return steps


def _disagreement(function: LinearFunction, problem: Problem, parts: Parts) -> str | None:
    """Return how the kernel differs from the reference on random input and this layer's own weight; None when it does
    not."""
    device = next(iter(parts.values())).device
    layout, dtype = problem.layout, problem.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, layout.in_features, generator=generator).to(device, dtype)
    bias = torch.randn(layout.out_features, generator=generator).to(device, dtype)
    bands = _bands(layout, parts)
    with torch.no_grad():
        for rows in (1, 3):
            # Anew for each: which columns of an int8 input stay unrounded depends on all of its rows.
            found = function(x[:rows].contiguous(), layout, parts, bias)
            if found.shape != (rows, layout.out_features) or found.dtype != dtype:
                return f"returned {tuple(found.shape)} {found.dtype}, expected {(rows, layout.out_features)} {dtype}"
            wanted = [reference.linear(x[:rows], cut, own, bias[where]) for where, cut, own in bands]
            expected = torch.cat(wanted, dim=-1).double()
            seen = torch.cat([found[:, where] for where, _, _ in bands], dim=-1).double()
            error = (seen - expected).norm() / expected.norm().clamp_min(1e-30)
            if not float(error) <= _TOLERANCE.get(dtype, 1e-4):
                warnings.warn(
                    f"a kernel gave a wrong result (relative error {float(error):.2e} against the reference) and is "
                    "not used",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return f"differs from the reference: relative error {float(error):.2e}"
    return None


def _bands(layout: Layout, parts: Parts) -> list[tuple[slice, Layout, Parts]]:
    """Return the rows to compare, each with layout and parts of theirs: all, or the first, the middle and the last of a
    matrix so tall that the reference would take seconds and hold all of it dense (an output head)."""
    n = layout.out_features
    whole: list[tuple[slice, Layout, Parts]] = [(slice(0, n), layout, parts)]
    if n <= 4 * _BAND:
        return whole
    middle = n // 2 // _BAND * _BAND
    bands: list[tuple[slice, Layout, Parts]] = []
    for start, stop in ((0, _BAND), (middle, middle + _BAND), (n - n % _BAND - _BAND, n)):
        cut = layout.select_rows(parts, start, stop)
        if cut is None:
            return whole
        bands.append((slice(start, stop), *cut))
    return bands
