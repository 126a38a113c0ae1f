"""The checkpoint that EETQ wrote, as fixtures: see data/strip_checkpoint.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from qhub.testing import threads

CHECKPOINT = Path(__file__).parent / "data" / "tiny-llama"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


@pytest.fixture
def checkpoint() -> Path:
    """Return the folder of a two-layer Llama that EETQ quantized."""
    return CHECKPOINT


@pytest.fixture
def stored() -> dict[str, Tensor]:
    """Return the checkpoint's tensors."""
    return load_file(CHECKPOINT / "model.safetensors")


@pytest.fixture
def reference() -> dict[str, Tensor]:
    """Return known answers for the checkpoint."""
    return load_file(CHECKPOINT / "reference.safetensors")
