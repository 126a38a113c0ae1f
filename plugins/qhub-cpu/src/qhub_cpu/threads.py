"""Which threads a product runs on: torch's own, so that two pools never wait for each other's processors.

torch's OpenMP runtime is in the process already; GNU's, LLVM's and Intel's all have GOMP_parallel, the call that a
compiler makes for a parallel region. Where there is none (a torch without OpenMP, Windows), a pool of Python threads
stands in.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

__all__ = ["OpenMP", "openmp", "share_out"]


@dataclass(frozen=True)
class OpenMP:
    """Holds the addresses of three functions of an OpenMP runtime."""

    fork: int
    thread: int
    count: int


@cache
def openmp() -> OpenMP | None:
    """Return the OpenMP runtime that torch uses; None if it uses none, or ``QHUB_CPU_OPENMP=0``."""
    if os.environ.get("QHUB_CPU_OPENMP") == "0" or not torch.backends.openmp.is_available():
        return None
    try:
        # torch makes the symbols of the libraries it depends on global, its OpenMP runtime among them.
        process: Any = ctypes.CDLL(None)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        found = [ctypes.cast(getattr(process, name), ctypes.c_void_p).value for name in names]
    except (AttributeError, OSError, TypeError):
        return None
    return OpenMP(*found) if all(found) else None  # type: ignore[arg-type]


def share_out(run: Callable[[int, int], Any], rows: int, threads: int) -> None:
    """Call ``run(first, last)`` for ``threads`` even shares of ``rows``, at the same time; wait for all."""
    edges = [rows * index // threads for index in range(threads + 1)]
    for future in [_pool(threads).submit(run, *edges[i : i + 2]) for i in range(threads)]:
        future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="qhub-cpu")
