"""What a method allows when an update goes back onto a quantized weight: the answer of the hook ``qhub_adapter``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["AdapterPolicy"]


@dataclass(frozen=True)
class AdapterPolicy:
    """Says what writing into a quantized weight does.

    ``grid``: ``"keep"`` leaves scales alone and picks codes on them, ``"refit"`` fits the scales to the new values,
    ``"best"`` takes whichever is nearer: to the values, or, where inputs of the layer are known, to its output.
    ``refuse``: why this weight cannot be written into; None when it can.
    """

    grid: Literal["keep", "refit", "best"] = "best"
    refuse: str | None = None
