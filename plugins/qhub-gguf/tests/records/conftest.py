"""References: random records and weights, with what llama.cpp reads in them and makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qhub_gguf.records import RECORDS
from safetensors.torch import load_file
from torch import Tensor

from qhub.layouts import Blocks


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def references() -> dict[str, Tensor]:
    """TYPE.records (2, bytes), TYPE.decoded (2, 512), weights (8, 512), TYPE.written (8, bytes); make_references.py."""
    return load_file(Path(__file__).parent / "data/references.safetensors")


@pytest.fixture(params=list(RECORDS))
def name(request: pytest.FixtureRequest) -> str:
    """The name of a type, each in turn."""
    return request.param


@pytest.fixture
def blocks(name: str, references: dict[str, Tensor]) -> tuple[Blocks, dict[str, Tensor]]:
    """A 2x512 layout of random records, and its parts."""
    return Blocks(out_features=2, in_features=512, record=RECORDS[name]), {"blocks": references[f"{name}.records"]}
