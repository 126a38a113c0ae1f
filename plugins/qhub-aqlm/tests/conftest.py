"""Known answers of aqlm, as fixtures: see data/make_golden.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_aqlm.plan import layout_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AqlmConfig

from qhub.layouts import Codebook
from qhub.plan import WeightInfo
from qhub.testing import threads

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """Is one layer that aqlm holds: its config, its entries, and what aqlm dequantizes them to."""

    config: Any
    entries: dict[str, Tensor]
    dequantized: Tensor

    @property
    def layout(self) -> Codebook:
        """Return the layout of the config for the layer's shape."""
        return layout_of(self.config, WeightInfo("known.weight", *self.dequantized.shape, torch.float16))

    def copy(self) -> dict[str, Tensor]:
        """Return entries that a test may change."""
        return {name: entry.clone() for name, entry in self.entries.items()}


def _golden() -> dict[str, Case]:
    with safe_open(DATA / "golden.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["cases"])
    tensors = load_file(DATA / "golden.safetensors")
    cases = {}
    for name, values in described.items():
        entries = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        dequantized = entries.pop("dequantized")
        cases[name] = Case(AqlmConfig(**values), entries, dequantized)
    return cases


GOLDEN = _golden()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``golden`` once per case."""
    if "golden" in metafunc.fixturenames:
        metafunc.parametrize("golden", list(GOLDEN.values()), ids=list(GOLDEN))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


@pytest.fixture
def golden_cases() -> dict[str, Case]:
    """Return every known answer."""
    return GOLDEN


@pytest.fixture
def twelve_bits() -> Case:
    """Return a layer with one codebook of 12 bits, whose int16 codes can point outside it."""
    return GOLDEN["1x12"]


@pytest.fixture
def tiny_checkpoint() -> Path:
    """Return the folder of a one-layer Llama in 2x8, with its logits and a dequantized layer beside it."""
    return DATA / "tiny-llama-2x8"
