"""How an HqqConfig is made without the hqq package: transformers' class imports that only to fill in seven values."""

from __future__ import annotations

import warnings
from typing import Any

from qhub.errors import ConfigError
from qhub_hqq.settings import base_config

__all__ = ["initialize"]


def initialize(
    self: Any,
    nbits: int = 4,
    group_size: int | None = 64,
    view_as_float: bool = False,
    axis: int | None = None,
    dynamic_config: dict[str, dict[str, Any]] | None = None,
    skip_modules: list[str] | None = None,
    **kwargs: Any,
) -> None:
    """Fill in an HqqConfig as transformers' own ``__init__`` does; what that ignores in silence is named in a warning.

    ``nbits``: 8, 4, 3, 2 or 1. ``group_size``: a multiple of 8; None for whole rows (axis 1) or columns (axis 0).
    ``view_as_float``: store packed codes under a float dtype. ``axis``: 0 or 1; None stands for 1. ``dynamic_config``:
    ``{layer tag: {"nbits": ..., "group_size": ..., ...}}``; layers whose tag (the module's name without "model",
    "layers" and numbers) is not in it stay dense. ``skip_modules``: modules or tags to leave dense; None stands for the
    output head. Raises :class:`ConfigError` on bad values.
    """
    from transformers.utils.quantization_config import QuantizationMethod

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
    self.quant_method = QuantizationMethod.HQQ
    self.skip_modules = ["lm_head"] if skip_modules is None else skip_modules
    self.post_init()
