"""How a GPTQConfig is made without the optimum package, and with every argument kept.

transformers' own ``__init__`` takes any keyword and drops those it does not know (``dynamic``, ``static_groups``, ...),
refuses names of data sets but three, and asks for optimum when ``modules_in_block_to_quantize`` is given.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from qhub.integrations.config_classes import without_data
from qhub_gptq.config import OTHER_KEYS

__all__ = ["checked", "initializer", "stand_in"]


def initializer(original: Callable[..., None]) -> Callable[..., None]:
    """Return an ``__init__`` that calls ``original`` and keeps the arguments that GPTQ's files know besides.

    ``quality`` goes under ``meta``, so that a file has no key that gptqmodel does not know. Anything else is named in a
    warning. ``dataset``: a name, a file, a list of strings or tokens, or None: what
    :func:`qhub.calibration.data.samples_of` takes; it is read when the model is calibrated.
    """

    @functools.wraps(original)
    def initialize(self: Any, bits: int, *args: Any, **kwargs: Any) -> None:
        others = {name: kwargs.pop(name) for name in sorted(OTHER_KEYS) if name in kwargs}
        quality = kwargs.pop("quality", None)
        unknown = sorted(set(kwargs) - _PARAMETERS - {"checkpoint_format", "quant_method"})
        if unknown:
            warnings.warn(f"GPTQConfig ignores {', '.join(unknown)}", stacklevel=2)
        if kwargs.get("desc_act"):
            # Only one of them can be; transformers says so in a warning, about a value that nobody gave.
            kwargs.setdefault("act_group_aware", False)
        original(self, bits, *args, **kwargs)
        for name, value in others.items():
            setattr(self, name, value)
        if quality is not None:
            self.meta = {**(self.meta or {}), "quality": quality}

    return initialize


def checked(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a ``post_init`` that checks what ``original`` does but for data sets and the optimum package."""

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        held = {name: getattr(self, name) for name in ("dataset", "modules_in_block_to_quantize")}
        for name in held:
            setattr(self, name, None)
        try:
            original(self)
        finally:
            for name, value in held.items():
                setattr(self, name, value)

    return post_init


def stand_in(module: ModuleType) -> None:
    """Let ``module.GPTQConfig`` keep its arguments and need no optimum; subclasses (AwqConfig) stay as they are.

    ``module``: ``transformers.utils.quantization_config``. The class stays itself; ``__init__``, ``post_init`` and
    ``to_dict`` are replaced.
    """
    cls = module.GPTQConfig
    for name, change in (("__init__", initializer), ("post_init", checked), ("to_dict", without_data)):
        original = getattr(cls, name)
        setattr(cls, name, _only_for(cls, original, change(original)))


def _only_for(cls: type, original: Callable[..., Any], replaced: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The plugin's own subclass has the name of transformers' class, by which transformers compares them.
        return (replaced if type(self).__name__ == cls.__name__ else original)(self, *args, **kwargs)

    return method


_PARAMETERS = frozenset(
    {
        "act_group_aware", "backend", "batch_size", "bits", "block_name_to_quantize", "cache_block_outputs",
        "damp_percent", "dataset", "desc_act", "format", "group_size", "max_input_length", "meta", "model_seqlen",
        "module_name_preceding_first_block", "modules_in_block_to_quantize", "pad_token_id", "sym", "tokenizer",
        "true_sequential",
    }
)  # fmt: skip
