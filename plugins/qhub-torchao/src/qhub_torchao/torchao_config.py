"""The config class of the plugin: transformers' own TorchAoConfig, which can be made without torchao."""

from __future__ import annotations

from transformers.utils import quantization_config

from qhub_torchao.initialize import stand_in

__all__ = ["TorchAoConfig"]

# Usually done when transformers was imported; again it changes nothing.
stand_in(quantization_config)
TorchAoConfig = quantization_config.TorchAoConfig
