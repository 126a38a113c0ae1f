"""Known answers of gptqmodel, as fixtures: see data/strip.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_gptq.config import spec
from qhub_gptq.format import GptqFormat
from qhub_gptq.plan import plan
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qhub.layouts import Affine
from qhub.plan import LayerPlan, WeightInfo
from qhub.testing import threads

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """Is one layer of a checkpoint: config, entries, and what gptqmodel dequantizes them to (float16)."""

    config: Any
    entries: dict[str, Tensor]
    dequantized: Tensor

    @property
    def layout(self) -> Affine:
        """Return the layout that the config plans for the layer's shape."""
        planned = plan(self.config, [WeightInfo("known.weight", *self.dequantized.shape, torch.float16)])[
            "known.weight"
        ]
        assert isinstance(planned, LayerPlan)
        assert isinstance(planned.layout, Affine)
        return planned.layout

    @property
    def format(self) -> GptqFormat:
        """Return the format of the config."""
        return GptqFormat(v1=self.config.format == "gptq")

    def copy(self) -> dict[str, Tensor]:
        """Return entries that a test may change."""
        return {name: entry.clone() for name, entry in self.entries.items()}


def _known() -> dict[str, Case]:
    with safe_open(DATA / "layers.safetensors", framework="pt") as file:
        configs = json.loads(file.metadata()["configs"])
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(DATA / "layers.safetensors").items():
        layer, _, entry = key.rpartition("/")
        layers.setdefault(layer, {})[entry] = tensor
    cases = {}
    for layer, entries in sorted(layers.items()):
        dequantized = entries.pop("dequant")
        cases[layer] = Case(spec().parse(configs[layer.partition("/")[0]]), entries, dequantized)
    return cases


KNOWN = _known()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``known`` once per layer, one that asks for ``folder`` once per checkpoint."""
    if "known" in metafunc.fixturenames:
        metafunc.parametrize("known", list(KNOWN.values()), ids=list(KNOWN))
    if "folder" in metafunc.fixturenames:
        folders = sorted(DATA.glob("tiny-llama-*"))
        metafunc.parametrize("folder", folders, ids=[folder.name for folder in folders])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


@pytest.fixture
def borrowing() -> Case:
    """Return a v1 layer, asymmetric, one of whose zeros is 0."""
    return KNOWN["b4-g32-asym/mlp.gate_proj"]


@pytest.fixture
def act_order() -> Case:
    """Return a layer of 4 bits, symmetric, in act-order, (128, 256) in groups of 32."""
    return KNOWN["b4-g32-act/mlp.down_proj"]


@pytest.fixture
def checkpoint() -> Path:
    """Return the folder of a one-layer Llama of 4 bits in act-order."""
    return DATA / "tiny-llama-b4-g32-act"
