"""What the core is told of TorchAoConfig: its keys, and which values are offered."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError
from qhub_torchao.reading import settings_by_name
from qhub_torchao.strings import ARGUMENTS

if TYPE_CHECKING:
    from qhub.reports import Finding

__all__ = ["check", "findings", "from_options", "spec"]

_BY_BITS = {8: "int8_weight_only", 4: "int4_weight_only"}


def spec() -> ConfigSpec:
    """Return the description of TorchAoConfig, for the files of every release of transformers."""
    return ConfigSpec(
        cls="qhub_torchao.torchao_config:TorchAoConfig",
        keys=ARGUMENTS | {"quant_type_kwargs", "include_embedding"},
        check=check,
        skip="modules_to_not_convert",
        embeddings="takes_tables",
        head="include_input_output_embeddings",
        untie="untie_embedding_weights",
        presets={
            "int8": {"quant_type": "int8_weight_only"},
            "int4": {"quant_type": "int4_weight_only", "group_size": 64},
            "int8-dynamic": {"quant_type": "int8_dynamic_activation_int8_weight"},
            "int8-int4": {"quant_type": "int8_dynamic_activation_int4_weight"},
            "fp8": {"quant_type": "float8_weight_only"},
            "fp8-dynamic": {"quant_type": "float8_dynamic_activation_float8_weight", "granularity": "PerRow"},
        },
        from_options=from_options,
    )


def from_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return config values for command-line ``options``: ``bits`` is 8 or 4, or stands for an intx weight."""
    values = dict(options)
    bits = values.pop("bits", None)
    if bits is None:
        return values
    if "quant_type" in values or type(bits) is not int or not 1 <= bits <= 8:
        raise ConfigError(f"bits={bits!r}: a torchao config takes a quant_type, or else 1 to 8 bits")
    if bits in _BY_BITS:
        return {"quant_type": _BY_BITS[bits], **values}
    size = values.pop("group_size", 64)
    grain = (
        {"_type": "PerAxis", "_data": {"axis": 0}}
        if size == -1
        else {"_type": "PerGroup", "_data": {"group_size": size}}
    )
    return {"quant_type": "intx_weight_only", "weight_dtype": f"int{bits}", "granularity": grain, **values}


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on a value that this plugin does not offer, naming it."""
    settings_by_name(config)
    skip = config.modules_to_not_convert
    if skip is not None and not (isinstance(skip, (list, tuple)) and all(isinstance(name, str) for name in skip)):
        raise ConfigError(f"modules_to_not_convert={skip!r} of a torchao config: it is a list of module names")
    for name in ("include_input_output_embeddings", "untie_embedding_weights"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name}={getattr(config, name)!r} of a torchao config: it is true or false")


def findings() -> list[Finding]:
    """Return what ``qhub doctor`` says of torchao."""
    from qhub.reports import Finding

    if importlib.util.find_spec("torchao") is None:
        message = "quantizes, loads and saves without the torchao package; the written files are ones that it reads"
    else:
        message = "the torchao package is installed too: its config objects are understood, its kernels are not used"
    return [Finding("ok", "torchao", message)]
