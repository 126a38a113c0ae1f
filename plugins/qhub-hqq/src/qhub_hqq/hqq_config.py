"""The config class of the plugin: transformers' HqqConfig, which can be made without the hqq package."""

from __future__ import annotations

from typing import Any

from transformers.utils import quantization_config

from qhub.errors import ConfigError
from qhub_hqq.initialize import initialize

__all__ = ["HqqConfig"]


class HqqConfig(quantization_config.HqqConfig):
    """Holds what transformers' own class holds, under the same names; see :func:`qhub_hqq.initialize.initialize`."""

    __init__ = initialize

    @classmethod
    def from_dict(cls, config: dict[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """Return a config from what a ``config.json`` holds (``quant_config``, ``skip_modules``), or from the arguments
        of the class.

        Raises :class:`ConfigError` when both are mixed.
        """
        values = {name: value for name, value in config.items() if name != "quant_method"}
        if "quant_config" not in values:
            return cls(**values, **kwargs)
        surplus = sorted(set(values) - {"quant_config", "skip_modules"})
        if surplus:
            raise ConfigError(
                f"an hqq config holds 'quant_config' and {surplus}: the settings of the layers go into quant_config"
            )
        result = cls(skip_modules=values.get("skip_modules"))
        result.quant_config = values["quant_config"]
        return result
