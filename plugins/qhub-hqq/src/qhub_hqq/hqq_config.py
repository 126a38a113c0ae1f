"""transformers' HqqConfig without the hqq package, which it imports only to fill in a dictionary of seven values."""

from __future__ import annotations

import warnings
from typing import Any

from transformers.utils import quantization_config

from qhub.errors import ConfigError
from qhub_hqq.settings import base_config

__all__ = ["HqqConfig"]


class HqqConfig(quantization_config.HqqConfig):
    """Holds the same values as transformers' own class, under the same names.

    ``nbits``: 8, 4, 3, 2 or 1. ``group_size``: a multiple of 8; None for whole rows (axis 1) or columns (axis 0).
    ``view_as_float``: store packed codes under a float dtype. ``axis``: 0 or 1; None stands for 1. ``dynamic_config``:
    ``{layer tag: {"nbits": ..., "group_size": ..., ...}}``; layers whose tag (the module's name without "model", "layers" and
    numbers) is not in it stay dense. ``skip_modules``: modules or tags to leave dense; None stands for the output head.
    Raises :class:`ConfigError` on bad values.
    """

    def __init__(
        self,
        nbits: int = 4,
        group_size: int | None = 64,
        view_as_float: bool = False,
        axis: int | None = None,
        dynamic_config: dict[str, dict[str, Any]] | None = None,
        skip_modules: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            warnings.warn(f"HqqConfig ignores {', '.join(sorted(kwargs))}", stacklevel=2)
        if dynamic_config is None:
            self.quant_config = base_config(
                nbits=nbits, group_size=group_size, view_as_float=view_as_float, axis=1 if axis is None else axis
            )
        else:
            try:
                self.quant_config = {tag: base_config(**values) for tag, values in dynamic_config.items()}
            except (TypeError, AttributeError) as error:
                raise ConfigError(f"dynamic_config={dynamic_config!r} of an hqq config: {error}") from error
        self.quant_method = quantization_config.QuantizationMethod.HQQ
        self.skip_modules = ["lm_head"] if skip_modules is None else skip_modules
        self.post_init()

    @classmethod
    def from_dict(cls, config: dict[str, Any], **kwargs: Any) -> Any:
        """Return a config from what a ``config.json`` holds (``quant_config``, ``skip_modules``), or from the arguments of the class.

        Raises :class:`ConfigError` when both are mixed.
        """
        values = {name: value for name, value in config.items() if name != "quant_method"}
        if "quant_config" not in values:
            return cls(**values, **kwargs)
        surplus = sorted(set(values) - {"quant_config", "skip_modules"})
        if surplus:
            raise ConfigError(f"an hqq config holds 'quant_config' and {surplus}: the settings of the layers go into quant_config")
        result = cls(skip_modules=values.get("skip_modules"))
        result.quant_config = values["quant_config"]
        return result
