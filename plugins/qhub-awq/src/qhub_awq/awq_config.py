"""The config class of the plugin: transformers' AwqConfig, which keeps every key of a ``config.json``.

transformers' own class drops the keys it does not know (``dynamic``, ``lm_head``, autoawq's fusing options), and has
one name for the format where files have several.
"""

from __future__ import annotations

from typing import Any

from transformers.utils import quantization_config

from qhub.errors import ConfigError
from qhub.integrations.config_classes import without_data
from qhub_awq.initialize import initializer

__all__ = ["AwqConfig"]

_FORMAT_KEYS = ("format", "checkpoint_format", "version")
# llm-awq and autoawq's quant_config.json have names of their own.
_ALIASES = {"w_bit": "bits", "q_group_size": "group_size"}
# Names of kernels that older versions of transformers took for formats; their files are gemm's.
_KERNELS = {"exllama": "gemm", "ipex": "gemm"}


class AwqConfig(quantization_config.AwqConfig):
    """Holds what transformers' own class holds, and the keys that autoawq, llm-awq, gptqmodel and AutoRound write."""

    __init__ = initializer(quantization_config.AwqConfig.__init__)
    to_dict = without_data(quantization_config.AwqConfig.to_dict)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return a config with every key of ``config_dict``.

        Raises :class:`ConfigError` when two keys that mean the same contradict each other, and ValueError or TypeError
        as transformers' class does.
        """
        values = {name: value for name, value in config_dict.items() if name != "quant_method"}
        for alias, name in _ALIASES.items():
            if alias in values:
                value = values.pop(alias)
                if values.setdefault(name, value) != value:
                    raise ConfigError(
                        f"{alias}={value!r} and {name}={values[name]!r} of an awq config: they mean the same"
                    )
        named = {name: values.pop(name) for name in _FORMAT_KEYS if values.get(name) is not None}
        for name in _FORMAT_KEYS:
            values.pop(name, None)
        if not all(isinstance(one, str) for one in named.values()):
            raise ConfigError(f"{named} of an awq config: a format is a string")
        # Enumerations of transformers are strings, and this makes plain ones of them.
        formats = {"".join(one).lower().replace("llm_awq", "llm-awq") for one in named.values()}
        formats = {_KERNELS.get(one, one) for one in formats}
        if len(formats) > 1:
            raise ConfigError(f"{named} of an awq config: they mean the same, so give one of them, or all alike")
        config = cls(**values, format=formats.pop() if formats else "gemm")
        config.format = "".join(config.format)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config
