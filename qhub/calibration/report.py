"""What a calibration found: errors, tokens and times, layer by layer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["CalibrationReport", "LayerReport"]


@dataclass(frozen=True)
class LayerReport:
    """Says how one matrix came out.

    ``error``: ||(W - W') X||^2 / ||W X||^2 over the calibration's inputs X of this layer; None where no statistic says
    it. ``tokens``: how many inputs it saw. ``seconds``: of quantizing, shared among layers that were quantized
    together. ``note``: what was out of the ordinary, empty otherwise.
    """

    name: str
    error: float | None
    tokens: int
    seconds: float
    note: str = ""


@dataclass
class CalibrationReport:
    """Collects the reports of all layers; ``seconds`` by phase; ``processes``: how many calibrated together."""

    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    processes: int = 1

    @contextmanager
    def timing(self, phase: str, device: torch.device) -> Iterator[None]:
        """Add what happens inside to a phase; the ``device`` is waited for at the end, so that the time is its own."""
        start = time.perf_counter()
        yield
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return dataclasses.asdict(self)
