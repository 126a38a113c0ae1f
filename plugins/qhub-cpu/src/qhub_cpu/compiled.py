"""Compiles with numba: device functions, entry points and OpenMP bodies, kept on disk between processes.

Numba keeps machine code in ``NUMBA_CACHE_DIR``, else beside the source, else (read-only installation) in the user's
cache folder. Where none of them can be written, code is compiled anew in each process, and the doctor says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import cfunc, njit, types

__all__ = ["body", "device", "entry", "keeps_code", "seal"]

# "numpy": a division by zero gives infinity as in torch, and leaves no branch that would raise.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def device(function: Callable) -> Any:
    """Compile a function that compiled code calls; it is merged into its callers, so constants given to it fold."""
    # Python never calls it: without wrappers it is compiled a quarter faster.
    options = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_OPTIONS}
    return njit(**options)(function)


def entry(function: Callable) -> Any:
    """Compile a function that Python calls with whole numbers."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        return njit(**_OPTIONS)(function)


def body(function: Callable) -> Any:
    """Compile a function of one address that runs on every thread; the result has its ``address``."""
    signature = types.void(types.intp)
    try:
        return cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError:
        return cfunc(signature, error_model="numpy")(function)


def keeps_code() -> bool:
    """Return whether there is a folder for compiled code."""
    try:
        njit(cache=True)(lambda: None)
    except RuntimeError:
        return False
    return True


@cache
def seal() -> int:
    """Return a number that stands for this package's sources.

    Numba notices a change only in the file of the function it kept, not in files whose functions were merged into it. A
    function that refers to this number from its closure is compiled anew when any of them changes.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:6], "little")
