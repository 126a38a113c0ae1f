"""How an AwqConfig is made with every argument kept, and written without data in it.

transformers' own ``__init__`` takes any keyword and drops those it does not know (``dynamic``, ``lm_head``, ...); its
``to_dict`` copies ``dataset`` and ``tokenizer``, texts and objects that do not belong into a config.json.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from qhub.integrations.config_classes import without_data
from qhub_awq.config import KNOWN_KEYS, OTHER_KEYS

__all__ = ["initializer", "stand_in"]


def initializer(original: Callable[..., None]) -> Callable[..., None]:
    """Return an ``__init__`` that calls ``original`` and keeps the arguments that AWQ's files know besides.

    Anything else is named in a warning. ``sym``, which means nothing here but is written, agrees with ``zero_point``.
    """

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        others = {name: kwargs.pop(name) for name in sorted(OTHER_KEYS) if name in kwargs}
        unknown = sorted(set(kwargs) - KNOWN_KEYS)
        if unknown:
            warnings.warn(f"AwqConfig ignores {', '.join(unknown)}", stacklevel=2)
        original(self, *args, **kwargs)
        self.sym = not self.zero_point
        for name, value in others.items():
            setattr(self, name, value)

    return initialize


def stand_in(module: ModuleType) -> None:
    """Let ``module.AwqConfig`` keep its arguments, and be written without data.

    ``module``: ``transformers.utils.quantization_config``. The class stays itself; ``__init__`` and ``to_dict`` are
    replaced.
    """
    cls = module.AwqConfig
    cls.__init__ = initializer(cls.__init__)
    cls.to_dict = without_data(cls.to_dict)
