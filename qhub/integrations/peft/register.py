"""Wraps the methods of PEFT's base classes that write into base weights: merge, unmerge, and LoftQ's start.

The wrapped methods do what they did wherever no quantized weight is concerned.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import wrapt

__all__ = ["install", "watch"]


def install() -> None:
    """Wrap PEFT's tuner models and all tuner layers, those of classes to come included. Doing it twice is harmless."""
    import peft
    from peft import peft_model, utils
    from peft.tuners import tuners_utils
    from peft.utils import other

    from qhub.integrations.peft import layers, loftq, models, starting

    # Which class has a method differs between versions of PEFT.
    tuners = {
        "merge_adapter": models.merge_adapter,
        "merge_and_unload": models.merge_and_unload,
        "inject_adapter": _inject,
    }
    _wrap_family(tuners_utils.BaseTuner, tuners)
    adapted = {"merge": layers.merge, "unmerge": layers.unmerge, "loftq_init": loftq.init_layer}
    _wrap_family(tuners_utils.BaseTunerLayer, adapted)
    _wrap(other.ModulesToSaveWrapper, "update", starting.copies_are_dense)
    # PEFT's save_pretrained looks in its own module, transformers' asks the package, which takes it from there.
    for module in (peft_model, utils, peft):
        _wrap(module, "get_peft_model_state_dict", starting.entries_are_dense)
    if importlib.util.find_spec("peft.tuners.lora.loraga") is not None:
        loraga = importlib.import_module("peft.tuners.lora.loraga")
        _wrap(loraga, "estimate_gradients", starting.with_dense_weights)


def watch() -> None:
    """Arrange that :func:`install` is done, now or when PEFT is imported."""
    wrapt.register_post_import_hook(lambda module: install(), "peft.peft_model")


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
    from qhub.integrations.peft import loftq, starting

    with loftq.injecting(model), starting.plain(model):
        return original(model, *args, **kwargs)


def _wrap(owner: Any, name: str, replacement: Any) -> None:
    """Let ``replacement(first argument, original bound to it, ...)`` stand in for a method, or a module's function."""
    original = vars(owner).get(name)
    # An older PEFT may not have it.
    if original is None or getattr(original, "_qhub", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, functools.partial(original, self), *args, **kwargs)

    method._qhub = True  # type: ignore[attr-defined]
    setattr(owner, name, method)
