"""Lets plugins prepare transformers' config classes, so that they can be made without the method's own library.

Some of those classes import the library in ``__init__`` and refuse to be made without it. A plugin that needs no
library announces a function in the entry-point group ``qhub.configs`` (the entry's name is the ``quant_method``). It is
called once, with the complete module ``transformers.utils.quantization_config``, and must be light: it runs before
anything is quantized.
"""

from __future__ import annotations

import os
import warnings
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

__all__ = ["CONFIG_GROUP", "prepare"]

CONFIG_GROUP = "qhub.configs"


def prepare(module: ModuleType) -> None:
    """Call the functions of the group with ``module``, or arrange that when its import is still under way."""
    if getattr(module.__spec__, "_initializing", False):
        # It imports torch in its own first lines, and torch's import is what brings qhub in: the usual case.
        module.__class__ = _Incomplete
    else:
        _call_plugins(module)


class _Incomplete(ModuleType):
    """Is a module in the middle of its import: prepared at its first use (like importlib.util.LazyLoader)."""

    def __getattribute__(self, name: str) -> Any:
        get = super().__getattribute__
        if not name.startswith("__") and not getattr(get("__spec__"), "_initializing", False):
            self.__class__ = ModuleType  # type: ignore[assignment]
            _call_plugins(self)
        return get(name)


def _call_plugins(module: ModuleType) -> None:
    off = {name.strip() for key in ("QHUB_DISABLE", "QHUB_NATIVE") for name in os.environ.get(key, "").split(",")}
    for entry in entry_points(group=CONFIG_GROUP):
        if entry.name in off:
            continue
        try:
            entry.load()(module)
        except Exception as error:
            warnings.warn(
                f"qhub goes on without {entry.value} of the plugin {entry.name!r}, which prepares transformers' "
                f"config classes: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
