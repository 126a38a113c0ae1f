"""Known answers of QuIP#, as fixtures: see data/make_golden.py and data/strip_checkpoint.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_quip.config import QuipConfig
from qhub_quip.plan import layout_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qhub.layouts import Codebook
from qhub.plan import WeightInfo
from qhub.testing import threads

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """Is one layer that QuIP# packed.

    ``given``: the matrix, rotated and over Wscale, that it rounded; ``rounded``: to what; ``dequantized``: the weight.
    """

    config: Any
    entries: dict[str, Tensor]
    given: Tensor
    rounded: Tensor
    dequantized: Tensor

    @property
    def layout(self) -> Codebook:
        """Return the layout of the config for the layer's shape."""
        return layout_of(self.config, WeightInfo("known.weight", *self.dequantized.shape, torch.float16))

    def copy(self) -> dict[str, Tensor]:
        """Return entries that a test may change."""
        return {name: entry.clone() for name, entry in self.entries.items()}


def _metadata() -> dict[str, Any]:
    with safe_open(DATA / "golden.safetensors", framework="pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


def _golden() -> dict[str, Case]:
    tensors = load_file(DATA / "golden.safetensors")
    cases = {}
    for name, values in _metadata()["cases"].items():
        held = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        answers = [held.pop(key) for key in ("input", "rounded", "dequantized")]
        cases[name] = Case(QuipConfig(**values), held, *answers)
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
def digests() -> dict[str, Any]:
    """Return digests of QuIP#'s Hadamard matrices and tables."""
    return _metadata()


@pytest.fixture
def known() -> dict[str, Case]:
    """Return every known answer."""
    return GOLDEN


@pytest.fixture
def checkpoint() -> Path:
    """Return the folder of a one-layer Llama in E8P12, with its logits and a dequantized layer beside it."""
    return DATA / "tiny-llama"
