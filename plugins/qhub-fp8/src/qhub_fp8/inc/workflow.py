"""The steps of Intel Neural Compressor's quantization: prepare, finalize_calibration, convert.

Source of their behaviour: neural-compressor 3, torch/quantization/quantize.py. In one process measurements are taken
over in memory; in two, the second reads the file that ``finalize_calibration`` of the first one wrote.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qhub.calibration import sharing
from qhub.calibration.products import Key
from qhub.errors import ConfigError
from qhub.plan import WeightInfo
from qhub_fp8.inc.config import FP8Config
from qhub_fp8.inc.measuring import Observers, node_name, read_measurements, write_measurements
from qhub_fp8.inc.plan import plain_name, quantize

__all__ = ["convert", "finalize_calibration", "load", "prepare", "save"]

logger = logging.getLogger("qhub")

_STATE = "_qhub_inc"


@dataclass
class _State:
    """Is what a prepared model carries. ``statistics``: once calibration is finalized."""

    config: FP8Config
    observers: Observers | None
    statistics: dict[str, dict[str, Tensor]] | None = None


def prepare(model: nn.Module, quant_config: FP8Config, inplace: bool = True) -> Any:
    """Return ``model`` with its layers' inputs measured while it runs.

    ``model``: a transformers model, or one with PEFT adapters, whose base layers are then measured. ``inplace``: False
    prepares a copy. Raises :class:`ConfigError` when the config says to quantize or load, or when the model is prepared
    or quantized already.
    """
    config = _config(quant_config)
    if config.mode in ("QUANTIZE", "LOAD"):
        raise ConfigError(f"mode={config.mode!r} of an inc config: prepare measures; call convert(model, config)")
    if _state(model) is not None:
        raise ConfigError("this model is prepared already: run text through it, then call finalize_calibration")
    prepared = model if inplace else copy.deepcopy(model)
    base = _base(prepared)
    infos = _planned(base, config).planned_infos()
    if any(info.experts is not None for info in infos.values()):
        # transformers' grouped products take all experts at once; one by one, each input is seen.
        base.set_experts_implementation("eager")
    observers = Observers(base, infos) if config.measures else None
    setattr(base, _STATE, _State(config, observers))
    return prepared


def finalize_calibration(model: nn.Module) -> None:
    """Stop measuring, and write what was measured to the config's ``dump_stats_path``.

    Raises :class:`ConfigError` for a model that is not prepared, or that saw nothing.
    """
    state = _state(model)
    if state is None:
        raise ConfigError("this model is not prepared: call prepare(model, FP8Config(...)) first")
    _finish(state)


def convert(model: nn.Module, quant_config: FP8Config | None = None, inplace: bool = True) -> Any:
    """Return ``model`` quantized; it saves, loads, and takes adapters as any quantized model does.

    ``quant_config``: needed for a model that was not prepared; its measurements are then read from the files that an
    earlier ``finalize_calibration`` wrote. Adapters that are on the model stay on it. Raises :class:`ConfigError` when
    a layer has no measurements, unless ``ignore_modules_wo_measures`` is set.
    """
    state = _state(model)
    if state is None and quant_config is None:
        raise ConfigError("this model is not prepared: give convert the config to quantize with")
    target = model if inplace else copy.deepcopy(model)
    base = _base(target)
    if state is not None:
        if quant_config is not None:
            logger.warning("inc: the config given to convert is not used, the model was prepared with one")
        if state.observers is not None and state.statistics is None:
            _finish(state)
        config, statistics = state.config, state.statistics or {}
        delattr(base, _STATE)
    else:
        config = _config(quant_config)
        statistics = read_measurements(config) if config.measures else {}
    if config.mode == "MEASURE":
        raise ConfigError("mode='MEASURE' of an inc config only measures: convert with mode='QUANTIZE' or 'AUTO'")
    _quantize(base, config, statistics)
    return target


def save(model: Any, checkpoint_dir: str | Path = "saved_results") -> None:
    """Save a converted model into a folder: ``model.save_pretrained``, under that library's name for it."""
    model.save_pretrained(checkpoint_dir)


def load(model_name_or_path: str | Path, **kwargs: Any) -> Any:
    """Return a causal language model of a folder or repository that ``save`` wrote, here or in the library itself.

    The library's own ``config.json`` does not say which method it is of, which transformers asks for; ``kwargs`` go to
    ``from_pretrained``. Raises :class:`ConfigError` for a model that was not quantized with this method.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_name_or_path)
    values = getattr(config, "quantization_config", None)
    if isinstance(values, dict):
        values.setdefault("quant_method", "inc")
    if not isinstance(values, dict) or values["quant_method"] != "inc":
        raise ConfigError(f"{model_name_or_path} is no model of Intel Neural Compressor: its config has {values!r}")
    return AutoModelForCausalLM.from_pretrained(model_name_or_path, config=config, **kwargs)


def _quantize(base: Any, config: FP8Config, statistics: dict[str, dict[str, Tensor]]) -> None:
    from qhub.integrations.transformers.weights import put_layers, set_tensor

    loaded = dataclasses.replace(config, mode="LOAD", dataset=None, tokenizer=None)
    quantizer = _planned(base, loaded)
    infos = quantizer.planned_infos()
    if config.measures:
        for name in _unmeasured(infos, statistics, config):
            quantizer.skipped[name] = "it has no measurements"
            del quantizer.plan[name], infos[name]
    for name, info in infos.items():
        planned = quantizer.plan[name]
        with torch.no_grad():
            weight = base.get_parameter(name).detach()
            if info.kind == "conv1d" or info.transposed:
                weight = weight.transpose(-1, -2)

            def matrix(expert: int | None, weight: Tensor = weight, name: str = name, planned: Any = planned) -> Any:
                one = weight if expert is None else weight[expert]
                known = statistics.get(node_name(Key(name, expert)), {})
                parts = quantize(loaded, one.contiguous(), planned.layout, known)
                return quantizer.quantization.build(planned.layout, parts, one.dtype, planned.compute_dtype)

            quantized = quantizer.quantization.assemble(info, matrix)
        put_layers(base, [info])
        set_tensor(base, name, quantized)
    quantizer.adopt(base)


def _unmeasured(infos: dict[str, WeightInfo], statistics: dict[str, dict[str, Tensor]], config: FP8Config) -> list[str]:
    """Return the weights that saw no input; raises :class:`ConfigError` unless they may be left alone.

    An expert that no token reached does not count, as long as another of its stack was.
    """
    missing = []
    for name, info in infos.items():
        nodes = [node_name(Key(name, expert)) for expert in ([None] if info.experts is None else range(info.experts))]
        if not any(node in statistics for node in nodes):
            missing.append(name)
    if missing and not config.ignore_modules_wo_measures:
        raise ConfigError(
            f"{len(missing)} layers have no measurements ({plain_name(missing[0])}, ...): run text through the "
            "prepared model that reaches them, put them on the blocklist, or set ignore_modules_wo_measures=True"
        )
    return missing


def _finish(state: _State) -> None:
    if state.observers is None:
        state.statistics = {}
        return
    if state.statistics is not None:
        return
    statistics = state.observers.statistics()
    if not statistics:
        raise ConfigError("the prepared model was never run: run calibration text through it before")
    weights = state.observers.weights()
    state.observers.remove()
    state.statistics = statistics
    if sharing.rank() == 0:
        file = write_measurements(state.config, statistics, weights)
        logger.info("inc: measurements of %d layers written to %s", len(statistics), file)
    sharing.barrier()


def _planned(base: Any, config: FP8Config) -> Any:
    """Return a quantizer that has planned ``base``."""
    from qhub.integrations.transformers import install
    from qhub.integrations.transformers.quantizer import quantizer_for

    if getattr(base, "is_quantized", False):
        raise ConfigError(f"this {type(base).__name__} is quantized already: load the unquantized model")
    install()
    quantizer = quantizer_for("inc", False)(config, pre_quantized=False)
    quantizer.plan_for(base)
    return quantizer


def _base(model: Any) -> Any:
    """Return the model below PEFT's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _state(model: Any) -> _State | None:
    return getattr(_base(model), _STATE, None)


def _config(given: Any) -> FP8Config:
    if isinstance(given, FP8Config):
        return given
    if isinstance(given, dict):
        return FP8Config.from_dict(given)
    raise ConfigError(f"an inc model is quantized with an FP8Config, not with a {type(given).__name__}")
