"""The config class of the plugin: transformers' CompressedTensorsConfig, made without the library of that name."""

from __future__ import annotations

from typing import Any

from transformers.utils import quantization_config

from qhub_compressed_tensors.initialize import METHODS
from qhub_compressed_tensors.matching import matching_pattern

__all__ = ["CompressedTensorsConfig"]


class CompressedTensorsConfig(quantization_config.CompressedTensorsConfig):
    """Holds the keys of a ``config.json`` under their own names; see :func:`qhub_compressed_tensors.initialize`."""

    config_groups: dict[str, Any] | None

    for _name, _method in METHODS.items():
        locals()[_name] = _method
    del _name, _method

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return a config for what a ``config.json`` holds, older files' nesting included."""
        values = dict(config_dict.get("quantization_config", config_dict))
        config = cls(**values)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    @property
    def targets_head(self) -> bool:
        """Return whether a target names the output head, which is left alone otherwise."""
        return any(matching_pattern(name, self._targets, ()) is not None for name in ("lm_head", "embed_out"))

    @property
    def targets_embeddings(self) -> bool:
        """Return whether a target is the class of the input embeddings, or their usual name."""
        return matching_pattern("model.embed_tokens", self._targets, ("Embedding",)) is not None

    @property
    def _targets(self) -> list[str]:
        groups = [group for group in (self.config_groups or {}).values() if isinstance(group, dict)]
        return [target for group in groups for target in group.get("targets") or [] if isinstance(target, str)]
