"""Wraps the methods of PEFT's base classes that write into base weights: merge, unmerge and their kin.

The wrapped methods do what they did wherever no quantized weight is concerned.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

__all__ = ["install"]


def install() -> None:
    """Wrap PEFT's tuner models and all tuner layers, those of classes to come included. Doing it twice is harmless."""
    from peft.tuners import tuners_utils

    from qhub.integrations.peft import models

    _wrap(tuners_utils.BaseTuner, "merge_adapter", models.merge_adapter)
    _wrap(tuners_utils.BaseTuner, "merge_and_unload", models.merge_and_unload)
    base: Any = tuners_utils.BaseTunerLayer
    for cls in _family(base):
        _wrap_layer(cls)
    if "__init_subclass__" not in vars(base):

        def __init_subclass__(cls: Any, **kwargs: Any) -> None:
            super(base, cls).__init_subclass__(**kwargs)
            _wrap_layer(cls)

        base.__init_subclass__ = classmethod(__init_subclass__)


def _family(base: Any) -> Iterator[Any]:
    for cls in base.__subclasses__():
        yield cls
        yield from _family(cls)


def _wrap_layer(cls: Any) -> None:
    from qhub.integrations.peft import layers

    for name in ("merge", "unmerge"):
        if name in vars(cls):
            _wrap(cls, name, getattr(layers, name))


def _wrap(cls: Any, name: str, replacement: Any) -> None:
    original = vars(cls)[name]
    if getattr(original, "_qhub", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, functools.partial(original, self), *args, **kwargs)

    method._qhub = True  # type: ignore[attr-defined]
    setattr(cls, name, method)
