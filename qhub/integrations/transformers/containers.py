"""What transformers' argument ``gguf_file`` opens is a plugin's container: config and tokenizer are read from it, and a
folder whose config.json names such a file is loaded from it.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qhub.integrations.late import wrap_when_imported
from qhub.registry import registry

if TYPE_CHECKING:
    from qhub.formats import Container

__all__ = ["file_named_by", "name_file", "wrap_readers"]

# The method whose file transformers' argument gguf_file names.
_HOST_METHOD = "gguf"


def file_named_by(values: Any) -> str | None:
    """Return the container file that a folder's quantization config names; None when there is none."""
    values = values if isinstance(values, dict) else getattr(values, "__dict__", {})
    name = values.get("gguf_file")
    if not name or name_of(values) != _HOST_METHOD or _HOST_METHOD in registry.handed_back():
        return None
    return str(name) if _HOST_METHOD in registry.list() else None


def name_of(values: Mapping[str, Any]) -> str:
    """Return the method that plain config ``values`` name."""
    method = values.get("quant_method", _HOST_METHOD)
    return str(getattr(method, "value", method))


def name_file(original: Any) -> Any:
    """Wrap ``PreTrainedModel.from_pretrained``: a folder whose config.json names a container is loaded from it, as if
    the caller had named it."""

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        if path is not None and not kwargs.get("gguf_file") and kwargs.get("state_dict") is None:
            config = kwargs.get("config")
            config = _config_of(cls, path, kwargs) if config is None or isinstance(config, str) else config
            name = file_named_by(getattr(config, "quantization_config", None))
            if name is not None:
                config = type(config).from_dict(
                    {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
                )
                kwargs.update(config=config, gguf_file=name)
        return original.__func__(cls, path, *args, **kwargs)

    from_pretrained._qhub = True  # type: ignore[attr-defined]
    return classmethod(from_pretrained)


def _config_of(cls: Any, path: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the config of a local folder, where it says that a container holds the weights; None else."""
    file = Path(str(path)) / "config.json"
    if cls.config_class is None or not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    if file_named_by(values.get("quantization_config")) is None:
        return None
    return cls.config_class.from_pretrained(path)


def wrap_readers() -> None:
    """Make transformers read config and tokenizer through the plugin's container.

    Its own readers trust every number in a file, and want the package gguf for most architectures.
    """
    lead = "transformers.integrations.gguf"
    wrap_when_imported("transformers.modeling_gguf_pytorch_utils", "load_gguf_checkpoint", _described)
    wrap_when_imported(f"{lead}.reader", "read_gguf_metadata", _checked)
    wrap_when_imported(f"{lead}.gguf_tokenizer_mapping", "get_gguf_tokenizer", _tokenizer)
    # 5.17 and 5.23 have it in different places.
    for module in (f"{lead}.gguf_tokenizer_mapping", "transformers.integrations.ggml"):
        wrap_when_imported(module, "convert_gguf_tokenizer", _converted)


class _Ready(dict[str, Any]):
    """Stands for the tokens and merges that transformers would make a tokenizer from; it is made when asked for."""

    def __init__(self, container: Container) -> None:
        super().__init__(tokenizer_type="ready")
        self._container = container

    @functools.cached_property
    def made(self) -> tuple[Any, dict[str, Any]]:
        """Return the tokenizer and the settings beside it."""
        return self._container.tokenizer()


class _Description(dict[str, Any]):
    """Is what transformers' loader returns: the config, and a tokenizer that most callers do not look at."""

    def __init__(self, container: Container) -> None:
        super().__init__(config=container.config(), tokenizer=_Ready(container))

    def __missing__(self, key: str) -> Any:
        if key != "tokenizer_config":
            raise KeyError(key)
        return self["tokenizer"].made[1]


def _open(path: Any) -> Container | None:
    if _HOST_METHOD in registry.handed_back() or _HOST_METHOD not in registry.list():
        return None
    config = registry.call(_HOST_METHOD, "qhub_config").resolve()(gguf_file=str(path))
    return registry.call(_HOST_METHOD, "qhub_container", config=config, file=Path(path))


def _described(original: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = inspect.signature(original).bind(*args, **kwargs)
    path, wants_tensors = call.args[0], call.arguments.get("return_tensors", False)
    container = None if wants_tensors else _open(path)
    return original(*args, **kwargs) if container is None else _Description(container)


def _checked(original: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A damaged file is refused by name here, before a length in it is believed.
    _open(args[0] if args else kwargs["gguf_path"])
    return original(*args, **kwargs)


def _tokenizer(original: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    path = args[0] if args else kwargs["gguf_path"]
    container = _open(path)
    if container is None:
        return original(*args, **kwargs)
    tokenizer = _Ready(container)
    return container.config().get("model_type"), tokenizer, tokenizer.made[1]


def _converted(original: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = inspect.signature(original).bind(*args, **kwargs).args[1]
    return (found.made[0], {}) if isinstance(found, _Ready) else original(*args, **kwargs)
