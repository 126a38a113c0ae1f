"""Known answers of autoawq and gptqmodel, as fixtures: see data/strip.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_awq.config import spec
from qhub_awq.format import AwqFormat, format_of
from qhub_awq.plan import plan
from safetensors.torch import load_file
from torch import Tensor

from qhub.layouts import Affine
from qhub.plan import LayerPlan, WeightInfo
from qhub.testing import threads

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(DATA.glob("tiny-llama-*"))


@dataclass(frozen=True)
class Case:
    """Is one layer of a checkpoint: config, entries, and the weights they stand for."""

    config: Any
    entries: dict[str, Tensor]
    dequantized: Tensor

    @property
    def layout(self) -> Affine:
        """Return the layout that the config plans for the layer's shape."""
        planned = plan(self.config, [WeightInfo("known.weight", *self.dequantized.shape, torch.float16)])
        found = planned["known.weight"]
        assert isinstance(found, LayerPlan)
        assert isinstance(found.layout, Affine)
        return found.layout

    @property
    def format(self) -> AwqFormat:
        """Return the format of the config."""
        return format_of(self.config)

    def copy(self) -> dict[str, Tensor]:
        """Return entries that a test may change."""
        return {name: entry.clone() for name, entry in self.entries.items()}


def _known() -> dict[str, Case]:
    cases = {}
    for folder in FOLDERS:
        config = spec().parse(json.loads((folder / "config.json").read_text())["quantization_config"])
        weights = load_file(folder / "model.safetensors")
        for key, dequantized in load_file(folder / "reference.safetensors").items():
            if key.startswith("dequant."):
                module = key.removeprefix("dequant.").removesuffix("weight")
                entries = {name.removeprefix(module): t for name, t in weights.items() if name.startswith(module)}
                label = f"{folder.name.removeprefix('tiny-llama-')}/{module.split('.')[-2]}"
                cases[label] = Case(config, entries, dequantized)
    return cases


KNOWN = _known()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``known`` once per layer, one that asks for ``folder`` once per checkpoint."""
    if "known" in metafunc.fixturenames:
        metafunc.parametrize("known", list(KNOWN.values()), ids=list(KNOWN))
    if "folder" in metafunc.fixturenames:
        metafunc.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


@pytest.fixture
def gemm() -> Case:
    """Return a layer of gptqmodel, (128, 256) in groups of 32, symmetric."""
    return KNOWN["gemm-g32/down_proj"]


@pytest.fixture
def checkpoint() -> Path:
    """Return the folder of a one-layer Llama that gptqmodel quantized."""
    return DATA / "tiny-llama-gemm-g32"
