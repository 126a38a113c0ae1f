"""What a conversion of a checkpoint did, and what it would have cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Conversion", "told"]

_SHOWN = 5


@dataclass
class Conversion:
    """Says what a conversion did.

    ``source``, ``target``: methods. ``weights``: matrices converted. ``losses``: what could not be said exactly, with
    the reason, by matrix; empty: every weight is the same number as before. ``kl``: where weights were quantized anew,
    the mean Kullback-Leibler divergence in nats of the result's predictions from the source's, over ``tokens``
    positions of ``text``. ``seconds``: what it took.
    """

    source: str
    target: str
    weights: int = 0
    losses: dict[str, str] = field(default_factory=dict)
    kl: float | None = None
    tokens: int = 0
    text: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def lossless(self) -> bool:
        """Return whether every weight is the number that it was."""
        return not self.losses

    def summary(self) -> str:
        """Return the report in a sentence or two."""
        if self.lossless:
            return f"{self.weights} weights from {self.source} to {self.target}, without loss: all compared and equal"
        text = f"{self.weights} weights from {self.source} to {self.target}, quantized anew ({told(self.losses)})"
        return text if self.kl is None else f"{text}; KL {self.kl:.4f} from the source, on {self.tokens} tokens"

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data, for a file."""
        return {**asdict(self), "lossless": self.lossless}


def told(losses: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in losses.items():
        by_reason.setdefault(reason, []).append(name)
    told = []
    for reason, names in list(by_reason.items())[:_SHOWN]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        told.append(f"{names[0]}{more}: {reason}" if names[0] else reason)
    return "; ".join(told)
