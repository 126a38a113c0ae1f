"""transformers' HqqConfig: what it may hold, and how it is made where the hqq package is not installed."""

from __future__ import annotations

import importlib.util
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError
from qhub_hqq.settings import base_config, disagreement, ignore, is_per_layer, settings_of

if TYPE_CHECKING:
    from qhub.reports import Finding

__all__ = ["check", "findings", "spec", "stand_in"]


def spec() -> ConfigSpec:
    """Return the description of HqqConfig, which can be made with or without hqq from then on."""
    from transformers.utils import quantization_config

    stand_in(quantization_config)
    return ConfigSpec(
        cls=quantization_config.HqqConfig,
        file_keys=frozenset({"quant_config", "skip_modules"}),
        check=check,
        skip="skip_modules",
    )


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on an unknown key or an impossible value of an HqqConfig."""
    settings = settings_of(config)
    clash = disagreement(settings.values())
    if clash is not None:
        raise ConfigError(
            f"two layers of an hqq config have the same nbits, group_size and axis and differ otherwise: {clash[0]} and {clash[1]}. "
            "Give them the same optimize, round_zero and view_as_float"
        )
    skip = config.skip_modules
    if skip is not None and not (isinstance(skip, (list, tuple)) and all(isinstance(name, str) for name in skip)):
        raise ConfigError(f"skip_modules={skip!r} of an hqq config: it is a list of module names")
    layers = config.quant_config.values() if is_per_layer(config.quant_config) else [config.quant_config]
    given_up = ("scale_quant_params", "zero_quant_params", "offload_meta")
    if any(layer.get(name) for layer in layers for name in given_up):
        ignore(name for name in given_up if any(layer.get(name) for layer in layers))


def stand_in(module: ModuleType) -> None:
    """Let ``module.HqqConfig`` be made without the hqq package; does nothing where that is installed.

    ``module``: ``transformers.utils.quantization_config``. Its HqqConfig imports hqq only to fill in a dictionary of seven
    values, and refuses to be made without it. The class stays, its ``__init__`` is replaced.
    """
    if importlib.util.find_spec("hqq") is None and module.HqqConfig.__init__ is not _init:
        module.HqqConfig.__init__ = _init


def _init(
    self: Any,
    nbits: int = 4,
    group_size: int | None = 64,
    view_as_float: bool = False,
    axis: int | None = None,
    dynamic_config: dict[str, dict[str, Any]] | None = None,
    skip_modules: list[str] | None = None,
    **kwargs: Any,
) -> None:
    """Make the config as transformers' own ``HqqConfig.__init__`` does; what it ignores in silence is named in a warning.

    ``axis``: None stands for 1. ``dynamic_config``: ``{layer tag: {"nbits": ..., "group_size": ..., ...}}``; layers whose tag
    (the module's name without "model", "layers" and numbers) is not in it stay dense. ``skip_modules``: None stands for the
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
        except TypeError as error:
            raise ConfigError(f"dynamic_config of an hqq config is {dynamic_config!r}: {error}") from error
    self.quant_method = QuantizationMethod.HQQ
    self.skip_modules = ["lm_head"] if skip_modules is None else skip_modules
    self.post_init()


def findings() -> list[Finding]:
    """Return what ``qhub doctor`` says of HQQ."""
    from qhub.reports import Finding

    if importlib.util.find_spec("hqq") is None:
        message = "quantizes, loads and saves without the hqq package; the written files are ones that hqq reads"
    else:
        message = "the hqq package is installed too; qhub does not use it"
    return [Finding("ok", "hqq", message)]
