"""Lets plugins prepare transformers' config classes, so that they can be made without the method's own library.

Some of those classes import the library in ``__init__`` and refuse to be made without it. A plugin that needs no
library announces a function in the entry-point group ``qhub.configs`` (the entry's name is the ``quant_method``). It is
called once, with the complete module ``transformers.utils.quantization_config``, and must be light: it runs before
anything is quantized.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qhub.integrations.late import when_complete

if TYPE_CHECKING:
    from qhub.calibration import CalibrationOptions

__all__ = ["CONFIG_GROUP", "calibration_of", "prepare", "without_data"]

CONFIG_GROUP = "qhub.configs"


def without_data(original: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Return a ``to_dict`` that names data and tokenizers: neither texts nor objects belong into a config.json."""

    @functools.wraps(original)
    def to_dict(self: Any) -> dict[str, Any]:
        held = {name: getattr(self, name) for name in ("dataset", "tokenizer")}
        for name, value in held.items():
            setattr(self, name, value if isinstance(value, str) else None)
        try:
            return original(self)
        finally:
            for name, value in held.items():
                setattr(self, name, value)

    return to_dict


def calibration_of(config: Any) -> CalibrationOptions:
    """Return what one of transformers' configs with ``dataset``, ``tokenizer``, ``model_seqlen``, ``batch_size`` and
    ``true_sequential`` asks of the calibration engine.

    Those classes have a batch of 1 where nothing is said, which is slow; the engine's own stands for that.
    """
    from qhub.calibration import CalibrationOptions

    options: dict[str, Any] = {"data": config.dataset, "tokenizer": config.tokenizer, "length": config.model_seqlen}
    if config.batch_size not in (None, 1):
        options["batch_size"] = config.batch_size
    return CalibrationOptions(**options, sequential="groups" if config.true_sequential else "block")


def prepare(module: ModuleType) -> None:
    """Call the functions of the group with ``module``, or arrange that when its import is still under way."""
    # It imports torch in its own first lines, and torch's import is what brings qhub in: the usual case.
    when_complete(module, _call_plugins)


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
