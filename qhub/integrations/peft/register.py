"""Wraps the methods of PEFT's base classes that write into base weights: merge, unmerge, and LoftQ's start.

The wrapped methods do what they did wherever no quantized weight is concerned.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["install"]


def install() -> None:
    """Wrap PEFT's tuner models and all tuner layers, those of classes to come included. Doing it twice is harmless."""
    from peft.tuners import tuners_utils

    from qhub.integrations.peft import layers, loftq, models

    # Which class has a method differs between versions of PEFT.
    tuners = {
        "merge_adapter": models.merge_adapter,
        "merge_and_unload": models.merge_and_unload,
        "inject_adapter": _inject,
    }
    _wrap_family(tuners_utils.BaseTuner, tuners)
    adapted = {"merge": layers.merge, "unmerge": layers.unmerge, "loftq_init": loftq.init_layer}
    _wrap_family(tuners_utils.BaseTunerLayer, adapted)


def _wrap_family(base: Any, replacements: Mapping[str, Any]) -> None:
    """Wrap the methods of ``base`` and of all its subclasses, now and later."""
    if "_qhub_wrapped" in vars(base):
        return
    base._qhub_wrapped = True

    def wrap(cls: Any) -> None:
        for name, replacement in replacements.items():
            if name in vars(cls):
                _wrap(cls, name, replacement)

    for cls in (base, *_family(base)):
        wrap(cls)

    def __init_subclass__(cls: Any, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)
        wrap(cls)

    base.__init_subclass__ = classmethod(__init_subclass__)


def _family(base: Any) -> Iterator[Any]:
    for cls in base.__subclasses__():
        yield cls
        yield from _family(cls)


def _inject(tuner: Any, original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    from qhub.integrations.peft import loftq

    with loftq.injecting(model):
        return original(model, *args, **kwargs)


def _wrap(cls: Any, name: str, replacement: Any) -> None:
    original = vars(cls)[name]
    if getattr(original, "_qhub", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, functools.partial(original, self), *args, **kwargs)

    method._qhub = True  # type: ignore[attr-defined]
    setattr(cls, name, method)
