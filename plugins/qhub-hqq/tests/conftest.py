"""Known answers of hqq, as fixtures: see data/make_golden.py. ``library``: layers of checkpoints that hqq wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from qhub_hqq.settings import Settings
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qhub.layouts import Affine
from qhub.testing import threads

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """Is one known answer: settings, the entries that hqq wrote, and what it dequantized them to.

    ``weight``: what was quantized; None where only the file is known.
    """

    settings: Settings
    entries: dict[str, Tensor]
    dequantized: Tensor
    weight: Tensor | None = None

    @property
    def layout(self) -> Affine:
        """Return the layout of the settings for the weight's shape."""
        return self.settings.layout(*self.dequantized.shape, "the known weight")

    def copy(self) -> dict[str, Tensor]:
        """Return entries that a test may change."""
        return {name: entry.clone() for name, entry in self.entries.items()}


def _group(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _golden() -> dict[str, Case]:
    with safe_open(DATA / "golden.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["cases"])
    tensors = load_file(DATA / "golden.safetensors")
    cases = {}
    for name, params in described.items():
        entries, weight = _group(tensors, name), tensors[f"weight.{params.pop('weight')}"]
        label = "-".join(f"{key}={value}" for key, value in params.items() if key in ("nbits", "axis", "group_size"))
        cases[f"{name}-{label}"] = Case(Settings(**params), entries, entries.pop("dequantized"), weight)
    return cases


def _library() -> dict[str, Case]:
    tensors = load_file(DATA / "library.safetensors")
    cases = {}
    for name, nbits, axis in (("hqq-b4-ax1", 4, 1), ("hqq-b3-ax0", 3, 0), ("hqq-b1-ax1", 1, 1)):
        entries = _group(tensors, name)
        cases[name] = Case(Settings(nbits, 64, axis, round_zero=nbits == 4), entries, entries.pop("dequantized"))
    return cases


GOLDEN, LIBRARY = _golden(), _library()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``golden``, ``library`` or ``known`` once per case."""
    for name, cases in (("golden", GOLDEN), ("library", LIBRARY), ("known", {**GOLDEN, **LIBRARY})):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(cases.values()), ids=list(cases))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


@pytest.fixture
def known_cases() -> dict[str, Case]:
    """Return every known answer."""
    return {**GOLDEN, **LIBRARY}


@pytest.fixture
def four_bit() -> Case:
    """Return a 4-bit layer, axis 1, groups of 64, that hqq wrote."""
    return LIBRARY["hqq-b4-ax1"]


@pytest.fixture
def same_bytes() -> Callable[[Tensor, Tensor], bool]:
    """Return a comparison by dtype, shape and bytes: codes seen as floats may be NaN."""

    def same(first: Tensor, second: Tensor) -> bool:
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))

    return same


@pytest.fixture
def tiny_checkpoint() -> Path:
    """Return the folder of a one-layer Llama that hqq quantized to 3 bits, axis 0, with its logits beside it."""
    return DATA / "tiny-llama-b3-axis0"
