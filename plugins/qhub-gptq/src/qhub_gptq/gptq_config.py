"""The config class of the plugin: transformers' GPTQConfig, which keeps every key of a ``config.json``.

transformers' own class drops the keys it does not know, ``dynamic`` and ``lm_head`` among them, and asks for the
optimum package when ``modules_in_block_to_quantize`` is set. Neither is what reading a checkpoint needs.
"""

from __future__ import annotations

from typing import Any

from transformers.utils import quantization_config

from qhub.errors import ConfigError
from qhub.integrations.config_classes import without_data
from qhub_gptq.config import OTHER_KEYS
from qhub_gptq.initialize import checked, initializer

__all__ = ["GPTQConfig"]

# What gptqmodel keeps under ``meta`` and transformers' class as values of its own, with other defaults.
_IN_META = ("act_group_aware", "damp_percent", "true_sequential")


class GPTQConfig(quantization_config.GPTQConfig):
    """Holds what transformers' own class holds, and the keys that gptqmodel, AutoGPTQ, optimum and AutoRound write.

    ``quality="high"`` asks for the quality option (see :mod:`qhub_gptq.quantize`) and is kept under ``meta``.
    """

    __init__ = initializer(quantization_config.GPTQConfig.__init__)
    post_init = checked(quantization_config.GPTQConfig.post_init)
    to_dict = without_data(quantization_config.GPTQConfig.to_dict)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return a config with every key of ``config_dict``.

        Raises :class:`ConfigError` when ``format`` and ``checkpoint_format`` contradict each other, and ValueError or
        TypeError as transformers' class does.
        """
        values = {name: value for name, value in config_dict.items() if name != "quant_method"}
        formats = [values[name] for name in ("format", "checkpoint_format") if values.get(name) is not None]
        if not all(isinstance(one, str) for one in formats) or len({one.lower() for one in formats}) > 1:
            raise ConfigError(
                f"format={values.get('format')!r} and checkpoint_format={values.get('checkpoint_format')!r} of a gptq "
                "config: they mean the same, so give one of them, or both alike"
            )
        # None is what some writers store for "not said"; transformers' class calls .lower() on it.
        values.pop("checkpoint_format", None)
        values["format"] = formats[0] if formats else "gptq"
        # Written by each tool as it likes, and of no use once the numbers are there: transformers refuses AutoRound's.
        dataset = values.pop("dataset", None)
        others = {name: values.pop(name) for name in sorted(OTHER_KEYS) if name in values}
        meta = values.get("meta")
        for name in _IN_META:
            if isinstance(meta, dict) and name in meta:
                values.setdefault(name, meta[name])
        # transformers turns it off for desc_act itself, with a warning about a value that nobody gave.
        values.setdefault("act_group_aware", not values.get("desc_act"))
        config = cls(**values)
        config.dataset = dataset
        for name, value in others.items():
            setattr(config, name, value)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config
