"""Ctrl-C stays what it is, wherever it comes.

Python raises KeyboardInterrupt in whatever runs: compiled code that looks at a Python object just then may lose it and
raise an error of its own instead (safetensors, asked for a tensor: "could not determine the shape of object").
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interruptible"]


@contextmanager
def interruptible() -> Iterator[None]:
    """Within: an error after Ctrl-C is raised as the KeyboardInterrupt that it was; the error is its cause.

    Where somebody else handles or ignores the signal, and outside the main thread, nothing is changed.
    """
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    asked = False

    def noted(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        usual(number, frame)

    signal.signal(signal.SIGINT, noted)
    try:
        yield
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, usual)
