"""How a TorchAoConfig is made without torchao: from its objects where they exist, their JSON, or the old strings."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

__all__ = ["initialize", "stand_in"]


def initialize(
    self: Any,
    quant_type: Any = None,
    modules_to_not_convert: list[str] | None = None,
    include_input_output_embeddings: bool = False,
    untie_embedding_weights: bool = False,
    **kwargs: Any,
) -> None:
    """Fill in a TorchAoConfig.

    ``quant_type``: a config object of torchao's, which is kept; its JSON; or a string (:mod:`qhub_torchao.strings`),
    whose arguments are ``kwargs`` or in ``kwargs["quant_type_kwargs"]``, as in files of transformers 4.
    ``modules_to_not_convert``: None stands for the output head and tied weights. ``include_input_output_embeddings``:
    quantize the embeddings and the output head too. ``untie_embedding_weights``: leave a tied output head as it was.
    Raises :class:`qhub.errors.ConfigError` on what is not known.
    """
    from transformers.utils.quantization_config import QuantizationMethod

    from qhub.errors import ConfigError
    from qhub_torchao.kinds import complete
    from qhub_torchao.strings import config_of
    from qhub_torchao.words import encoded, of_torchao

    arguments = {**(kwargs.pop("quant_type_kwargs", None) or {}), **kwargs}
    embeddings = bool(arguments.pop("include_embedding", False)) or include_input_output_embeddings
    arguments.pop("quant_method", None)
    if isinstance(quant_type, Mapping) and set(quant_type) == {"default"}:
        quant_type = quant_type["default"]
    if isinstance(quant_type, str):
        quant_type = complete(config_of(quant_type, arguments))
    elif arguments:
        raise ConfigError(
            f"a torchao config was given {sorted(arguments)}, which only a quant_type that is a string takes: put them "
            "into the config object"
        )
    elif isinstance(quant_type, Mapping):
        quant_type = complete(quant_type)
    elif of_torchao(quant_type):
        complete(encoded(quant_type))
    else:
        raise ConfigError(
            f"quant_type={quant_type!r} of a torchao config: expected a config object of torchao's, what it is written "
            'as in a config.json, or a string such as "int8_weight_only"'
        )
    self.quant_method = QuantizationMethod.TORCHAO
    self.quant_type = quant_type
    self.modules_to_not_convert = modules_to_not_convert
    self.include_input_output_embeddings = embeddings
    self.untie_embedding_weights = untie_embedding_weights


def to_dict(self: Any) -> dict[str, Any]:
    """Return the config as plain data, as torchao and transformers write it."""
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from qhub_torchao.kinds import complete
    from qhub_torchao.words import encoded

    values = QuantizationConfigMixin.to_dict(self)
    return {**values, "quant_type": {"default": complete(encoded(self.quant_type))}}


def takes_tables(self: Any) -> bool:
    """Return whether embeddings may be quantized: where that is asked for, or where a FqnToConfig may name them."""
    from qhub_torchao.kinds import complete, parts_of
    from qhub_torchao.words import encoded

    return self.include_input_output_embeddings or parts_of(complete(encoded(self.quant_type))) is not None


def from_dict(cls: type, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
    """Return a config from what a ``config.json`` holds, of any release of transformers."""
    values = {name: value for name, value in config_dict.items() if name != "quant_method"}
    config = cls(**values)
    unused = config.update(**kwargs) if kwargs else {}  # type: ignore[attr-defined]
    return (config, unused) if return_unused_kwargs else config


def stand_in(module: ModuleType) -> None:
    """Let ``module.TorchAoConfig`` be made without torchao, and from strings.

    ``module``: ``transformers.utils.quantization_config``. The class stays itself, the methods that import torchao are
    replaced.
    """
    cls = module.TorchAoConfig
    cls.__init__ = initialize
    cls.post_init = lambda self: None
    cls.to_dict = to_dict
    cls.takes_tables = property(takes_tables)
    cls.from_dict = classmethod(from_dict)
