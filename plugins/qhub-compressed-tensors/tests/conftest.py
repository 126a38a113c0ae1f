"""Known answers of compressed-tensors, as fixtures: see data/strip.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_compressed_tensors.config import spec
from qhub_compressed_tensors.format import CompressedTensorsFormat
from qhub_compressed_tensors.plan import plan
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qhub.layouts import Layout
from qhub.plan import LayerPlan, WeightInfo
from qhub.testing import threads

DATA = Path(__file__).parent / "data"
MODULE = "model.layers.0.self_attn.k_proj"


@dataclass(frozen=True)
class Case:
    """Is one layer under one scheme: config, entries, and the float32 weight that the library makes of them.

    ``dtype``: of the dense weight that was compressed.
    """

    scheme: str
    config: Any
    entries: dict[str, Tensor]
    dequantized: Tensor
    dtype: torch.dtype

    @property
    def layout(self) -> Layout:
        """Return the layout that the config plans for the layer."""
        return planned(self.config, *self.dequantized.shape)

    @property
    def format(self) -> CompressedTensorsFormat:
        """Return the format."""
        return CompressedTensorsFormat()

    def copy(self) -> dict[str, Tensor]:
        """Return entries that a test may change."""
        return {name: entry.clone() for name, entry in self.entries.items()}


def planned(config: Any, out_features: int, in_features: int, module: str = MODULE) -> Layout:
    """Return the layout that ``config`` plans for a weight of ``module``."""
    name = f"{module}.weight"
    found = plan(config, [WeightInfo(name, out_features, in_features, torch.float32)])[name]
    assert isinstance(found, LayerPlan), found
    return found.layout


def _known() -> dict[str, Case]:
    with safe_open(DATA / "layers.safetensors", framework="pt") as file:
        header = file.metadata()
    configs, dtypes = json.loads(header["configs"]), json.loads(header["dtypes"])
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(DATA / "layers.safetensors").items():
        scheme, _, entry = key.rpartition("/")
        layers.setdefault(scheme, {})[entry] = tensor
    return {
        scheme: Case(
            scheme, spec().parse(configs[scheme]), {k: v for k, v in entries.items() if k != "dequant"},
            entries["dequant"], getattr(torch, dtypes[scheme]),
        )
        for scheme, entries in sorted(layers.items())
        if scheme in configs
    }  # fmt: skip


KNOWN = _known()
DENSE = load_file(DATA / "layers.safetensors")["dense"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``known`` once per scheme, one that asks for ``folder`` once per checkpoint."""
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
def dense() -> Tensor:
    """Return the weight (64, 128) float32 that the known layers were made of."""
    return DENSE


@pytest.fixture
def cases() -> dict[str, Case]:
    """Return the known layers by scheme."""
    return KNOWN


@pytest.fixture
def older() -> dict[str, dict[str, Tensor]]:
    """Return two layers of compressed-tensors 0.11: entries and ``dequant``."""
    found: dict[str, dict[str, Tensor]] = {"3 bits": {}, "act-order": {}}
    for key, tensor in load_file(DATA / "layers.safetensors").items():
        if key.startswith("older/"):
            _, name, entry = key.split("/")
            found[name][entry] = tensor
    return found
