"""Known answers of torchao, as fixtures: see data/make_golden.py. The tiny models are checkpoints that it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_torchao.config import spec
from qhub_torchao.plan import plan
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qhub.layouts import Layout
from qhub.plan import LayerPlan, WeightInfo
from qhub.testing import threads

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """Is one known answer: a config, a weight, and what torchao made of it.

    ``header``: its entry in the file's header. ``entries``: its flattened tensors. ``dequantized``: in the weight's
    dtype. ``inputs``, ``outputs``: of the linear layer.
    """

    name: str
    values: dict[str, Any]
    header: dict[str, Any]
    dense: Tensor
    entries: dict[str, Tensor]
    dequantized: Tensor
    inputs: Tensor
    outputs: Tensor

    @property
    def config(self) -> Any:
        """Return the TorchAoConfig."""
        return spec().parse({"quant_method": "torchao", "quant_type": {"default": self.values}})

    @property
    def layout(self) -> Layout:
        """Return the layout that is planned for the weight."""
        planned = plan(self.config, [self.info])[self.info.name]
        assert isinstance(planned, LayerPlan)
        return planned.layout

    @property
    def info(self) -> WeightInfo:
        """Return what the core would say of the weight."""
        return WeightInfo("m.weight", *self.dense.shape, self.dense.dtype)


def _cases() -> dict[str, Case]:
    with safe_open(DATA / "golden.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["cases"])
    tensors = load_file(DATA / "golden.safetensors")
    found = {}
    for name, case in described.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        named = {key: own.pop(key) for key in ("dense", "dequantized", "inputs", "outputs")}
        found[name] = Case(name, case["config"], case["header"], entries=own, **named)
    return found


CASES = _cases()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``golden`` once per case."""
    if "golden" in metafunc.fixturenames:
        metafunc.parametrize("golden", list(CASES.values()), ids=list(CASES))


@pytest.fixture
def cases() -> dict[str, Case]:
    """Return the known answers by name."""
    return CASES


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


@pytest.fixture
def same() -> Callable[[Tensor, Tensor], bool]:
    """Return a comparison by dtype, shape and bytes."""

    def compare(first: Tensor, second: Tensor) -> bool:
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))

    return compare
