"""What a calibration found: errors, tokens and times, layer by layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["CalibrationReport", "LayerReport", "synchronize"]


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a phase's time is its own."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


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

    def spend(self, phase: str, seconds: float) -> None:
        """Add ``seconds`` to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return dataclasses.asdict(self)
