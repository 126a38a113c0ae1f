"""Random quantized matrices, and the offer of this package's kernels where it is not installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import qhub_bridges
import torch

from qhub.kernels import dispatch
from qhub.registry import registry
from qhub.testing import threads


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


@pytest.fixture(autouse=True)
def _offered(tmp_path, monkeypatch) -> Iterator[None]:
    # No measurements of the machine's user.
    monkeypatch.setenv("QHUB_CACHE", str(tmp_path))
    dispatch.forget()
    installed = "tinygemm" in dispatch.kernels()
    if not installed:
        registry.register(qhub_bridges, "bridges-under-test", group="qhub.kernels")
        dispatch.forget()
    yield
    if not installed:
        registry.unregister("bridges-under-test", group="qhub.kernels")
    dispatch.forget()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
