"""Small tensors: one thread is faster than two that wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qhub.testing import threads


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield
