"""One set of models for all tests of adapters, and quiet libraries."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from qhub.testing import threads

from .bases import Bases
from .matrix import Matrix
from .recording import Record


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: one thread is faster than two that wait for each other."""
    with threads.one_thread():
        yield


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Hide what peft and transformers say to users of real models."""
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("transformers").setLevel(level)


@pytest.fixture(scope="package")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """The tiny models."""
    return Bases(tmp_path_factory)


@pytest.fixture(scope="package")
def matrix(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    """What runs cells; at the end it writes what they gave, if that was asked for."""
    record = Record()
    yield Matrix(bases, record, tmp_path_factory)
    record.write()
