"""What a merge kept and what it lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["MergeReport", "MergedLayer"]


@dataclass(frozen=True)
class MergedLayer:
    """Says how the update went into one weight.

    ``name``: of the weight. ``grid``: ``"keep"``, ``"refit"``, ``"zeros"`` (scales kept, zeros moved) or ``"exact"``
    (the weight already was what it should be). ``spread``: whether rounding errors were made up for by other input
    features. ``update``: ||(new - old) x|| / ||new x||, what would be lost were nothing written. ``error``:
    ||(written - new) x|| / ||new x||, what is lost. ``rows``: how many inputs x that was measured on; 0: on none, x is
    left out.
    """

    name: str
    grid: str
    spread: bool
    update: float
    error: float
    rows: int


@dataclass
class MergeReport:
    """Says what a merge of adapters into a quantized model kept.

    ``kl``: mean over ``tokens`` positions of the Kullback-Leibler divergence, in nats, of the merged model's
    predictions from those of the base with the adapters on top; ``kl_without``: the same of the base without the
    adapters, that is, what there was to keep. None: not measured, and ``notes`` say why. ``seconds``: what it took.
    """

    adapters: list[str] = field(default_factory=list)
    layers: list[MergedLayer] = field(default_factory=list)
    kl: float | None = None
    kl_without: float | None = None
    tokens: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def kept(self) -> float | None:
        """Return the part of the adapters' effect that is left, 1 - kl / kl_without; None where it was not measured."""
        if self.kl is None or not self.kl_without:
            return None
        return 1 - self.kl / self.kl_without

    def summary(self) -> str:
        """Return the report in a sentence or two."""
        grids = ", ".join(f"{count} {grid}" for grid, count in sorted(Counter(one.grid for one in self.layers).items()))
        text = f"merged {' and '.join(self.adapters) or 'adapters'} into {len(self.layers)} weights"
        text += f" (grid: {grids})" if grids else ""
        if self.kl is not None:
            text += f"; KL from adapter on top {self.kl:.4f}"
            if self.kl_without is not None:
                text += f", {self.kl_without:.4f} without the adapter"
        return "; ".join([text, *self.notes])

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data, for a file."""
        return asdict(self)
