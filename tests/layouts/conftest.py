"""Small tensors: one thread is faster than two that wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qhub.testing import threads


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


@pytest.fixture
def reference_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply by the reference, whatever kernels are installed: these tests are about layouts."""
    monkeypatch.setenv("QHUB_KERNEL", "reference")
