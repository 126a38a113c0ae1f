"""The tiny models of data/tiny_models.py, and where the data is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

DATA = Path(__file__).parent / "data"

_spec = importlib.util.spec_from_file_location("qhub_gguf_tiny_models", DATA / "tiny_models.py")
assert _spec is not None and _spec.loader is not None
_tiny_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny_models)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of the tests' data."""
    return DATA


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Any]:
    """Return the maker of tiny models: name -> model."""
    return _tiny_models.build  # type: ignore[no-any-return]


@pytest.fixture(params=list(_tiny_models.MODELS))
def model_name(request: pytest.FixtureRequest) -> str:
    """The name of a tiny model, each in turn."""
    return str(request.param)
