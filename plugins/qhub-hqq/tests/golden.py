"""What hqq itself made of a few weights: see data/make_golden.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from qhub_hqq.settings import Settings
from safetensors import safe_open
from torch import Tensor

from qhub.layouts import Affine

__all__ = ["DATA", "GoldenCase", "golden_case", "golden_names"]

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class GoldenCase:
    """Is one weight and what hqq made of it."""

    settings: Settings
    weight: Tensor
    entries: dict[str, Tensor]
    dequantized: Tensor

    @property
    def layout(self) -> Affine:
        """Return the layout of the settings for the weight's shape."""
        return self.settings.layout(*self.weight.shape, "the golden weight")


@cache
def _opened() -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    with safe_open(DATA / "golden.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["cases"])  # noqa: SIM118


def golden_names() -> list[str]:
    """Return the names of all cases."""
    return list(_opened()[1])


def golden_case(name: str) -> GoldenCase:
    """Return one case."""
    tensors, cases = _opened()
    params = dict(cases[name])
    dtype = params.pop("dtype")
    entries = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    dequantized = entries.pop("dequantized")
    return GoldenCase(Settings(**params), tensors[f"weight.{dtype}"], entries, dequantized)


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes; NaNs (codes seen as floats) compare by their bits."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
