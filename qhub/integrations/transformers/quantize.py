"""One call for every method and every source: a live model in place, a folder or a repository into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qhub.config import method_of
from qhub.errors import ConfigError
from qhub.registry import registry

__all__ = ["load_and_quantize", "quantize", "streams"]


def quantize(
    model: Any, config: Any, *, out: str | Path | None = None, data: Any = None, progress: Any = None, **options: Any
) -> Any:
    """Quantize ``model`` as ``config`` says.

    ``model``: a model in memory, which is quantized in place and returned (methods without data take each weight as it
    is); or a folder or a repository, quantized into the folder ``out``: methods that need data stream, one block in
    memory at a time, and go on after a kill. ``config``: a config object of an installed method. ``data``: calibration
    data, see :func:`qhub.calibration.data.samples_of`; None: what the config names, else text that the model writes.
    ``options``: further fields of :class:`qhub.calibration.CalibrationOptions`. ``progress``: called with (finished
    blocks, of how many, the block's name); None: a progress bar.

    Returns the model: from a folder one without weights if it was streamed; its ``hf_quantizer.calibration`` is the
    report. Raises :class:`ConfigError` for a model that is quantized already, or a folder without ``out``.
    """
    from qhub.integrations.transformers import install

    install()
    chosen = {name: value for name, value in {"data": data, **options}.items() if value is not None}
    if isinstance(model, nn.Module):
        if out is not None:
            raise ConfigError("out is for quantizing from folder to folder: save a live model with save_pretrained")
        return _in_place(model, config, chosen, progress)
    if out is None:
        raise ConfigError(
            f"quantizing {model} needs a folder to put the result into: give out, or load the model first"
        )
    from qhub.integrations.transformers.folders import copy_companions, local_folder
    from qhub.integrations.transformers.streaming import quantize_folder

    method = method_of(config)
    if streams(method, config):
        done = quantize_folder(str(model), config, Path(out), options=chosen, progress=progress).model
    else:
        done = load_and_quantize(str(model), config, chosen, progress)
        done.save_pretrained(out)
    copy_companions(local_folder(str(model)), Path(out))
    return done


def streams(method: str, config: Any) -> bool:
    """Return whether ``method`` is quantized from folder to folder with one block in memory at a time, as ``config``
    says.

    Those without data are as quick as loading; a file that is no safetensors is written in one piece.
    """
    if not registry.has(method, "qhub_calibration") or registry.has(method, "qhub_save"):
        return False
    return registry.call(method, "qhub_calibration", config=config) is not None


def load_and_quantize(model: str, config: Any, options: dict[str, Any], progress: Any = None, **loading: Any) -> Any:
    """Return ``model``, a folder or repository, quantized as ``config`` says; ``options``: of the calibration, for
    methods that calibrate; ``loading``: for ``from_pretrained``."""
    from transformers import AutoConfig

    from qhub.integrations.transformers.folders import model_class

    cls = model_class(AutoConfig.from_pretrained(model))
    if not options:
        return cls.from_pretrained(model, quantization_config=config, **loading)
    return _in_place(cls.from_pretrained(model, **loading), config, options, progress)


def _in_place(model: Any, config: Any, options: dict[str, Any], progress: Any) -> Any:
    from qhub.integrations.transformers.quantizer import quantizer_for
    from qhub.integrations.transformers.weights import put_layers, set_tensor

    if getattr(model, "is_quantized", False):
        raise ConfigError(
            f"this {type(model).__name__} is quantized already: dequantize() it first, or load the unquantized model"
        )
    quantizer = quantizer_for(method_of(config), False)(config, pre_quantized=False)
    quantizer.plan_for(model)
    if quantizer.calibrates:
        quantizer.calibrate(model, progress, **options)
    else:
        for name, info in quantizer.planned_infos().items():
            with torch.no_grad():
                quantized = quantizer.quantize(name, model.get_parameter(name).detach())
            put_layers(model, [info])
            set_tensor(model, name, quantized)
    quantizer.adopt(model)
    return model
