"""LoftQ on any method: LoRA starts at what quantizing lost, not at zero (Li et al. 2023, "LoftQ", algorithm 1).

In turn: the best codes for W - B A on the layer's own layout, then the best B A of rank r for what these codes miss.
With one step the codes stay what they are.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qhub.errors import CheckpointError, ConfigError, UnsupportedError
from qhub.integrations.peft.layers import quantized_of
from qhub.integrations.peft.low_rank import factors_of
from qhub.plan import LayerPlan, WeightInfo
from qhub.tensor import QuantizedTensor

__all__ = ["LoftqLayer", "LoftqReport", "init_layer", "injecting", "loftq_init"]

logger = logging.getLogger("qhub")

_MOST_STEPS = 100


@dataclass(frozen=True)
class LoftqLayer:
    """Says how near one layer is to the unquantized one: ||W - Q - s B A|| / ||W||.

    ``before``: with LoRA's zero start; ``after``: with what was found; ``step``: the one that was best, 1 leaves the
    codes as they were.
    """

    name: str
    before: float
    after: float
    step: int


@dataclass
class LoftqReport:
    """Says what :func:`loftq_init` did, layer by layer, and which layers it left alone, with the reason."""

    layers: list[LoftqLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def before(self) -> float:
        """Return the mean relative error of LoRA's zero start."""
        return sum(layer.before for layer in self.layers) / max(len(self.layers), 1)

    @property
    def after(self) -> float:
        """Return the mean relative error now."""
        return sum(layer.after for layer in self.layers) / max(len(self.layers), 1)

    @property
    def requantized(self) -> bool:
        """Return whether codes of the base changed, so that the adapter fits no other copy of it."""
        return any(layer.step > 1 for layer in self.layers)


@torch.no_grad()
def loftq_init(model: Any, dense: Any = None, *, steps: int = 1, adapter: str = "default") -> LoftqReport:
    """Start the LoRA ``adapter`` of a ``PeftModel`` on a quantized base at what quantizing lost.

    ``dense``: the unquantized model: a folder or repository, a model in memory, or {weight's name: tensor}; None: where
    the base was loaded from, if it was quantized while loading. ``steps``: 1 leaves the base as it is, so the adapter
    fits every copy of it; more, to 5 usually, requantize the base in turn, and it must be saved with the adapter. The
    adapter's factors are replaced. Raises :class:`ConfigError` for a model without that adapter or with wrong steps,
    :class:`CheckpointError` when ``dense`` lacks a weight or has another shape.
    """
    from peft.tuners.lora import LoraLayer

    _check_steps(steps)
    base = getattr(model, "base_model", model)
    root = getattr(base, "model", base)
    layers = {
        name: module
        for name, module in root.named_modules()
        if isinstance(module, LoraLayer) and hasattr(module, "base_layer") and adapter in module.r
    }
    if not layers:
        raise ConfigError(f"this model has no LoRA adapter {adapter!r}: nothing to start anew")
    report = LoftqReport()
    with ExitStack() as stack:
        weights = _weights(root, dense, stack)
        for name, layer in layers.items():
            reason = _unfit(layer, adapter)
            if reason is not None:
                report.skipped[name] = reason
                continue
            weight = quantized_of(layer)["weight"]
            found = _start(layer, adapter, weight, weights(f"{name}.weight"), steps)
            report.layers.append(LoftqLayer(name, *found))
    for name, reason in report.skipped.items():
        logger.warning("LoftQ leaves %s as it is: %s", name, reason)
    if report.requantized:
        logger.warning(
            "LoftQ requantized the base in %s of %s layers: save it with the adapter, which fits no other copy",
            sum(layer.step > 1 for layer in report.layers),
            len(report.layers),
        )
    return report


def _check_steps(steps: Any) -> None:
    if type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
        raise ConfigError(f"LoftQ with {steps!r} steps: it takes 1 to {_MOST_STEPS}; 5 are enough")


def _unfit(layer: Any, adapter: str) -> str | None:
    weight = quantized_of(layer).get("weight")
    if weight is None:
        return "its base is not quantized"
    if adapter not in layer.lora_A or weight.ndim != 2:
        return "it is no linear layer"
    if adapter in getattr(layer, "lora_variant", {}):
        return "DoRA and other variants take their start from PEFT: give init_lora_weights='loftq' instead"
    if layer.merged:
        return "adapters are merged into it: unmerge them first"
    return None


def _start(layer: Any, adapter: str, weight: QuantizedTensor, dense: Tensor, steps: int) -> tuple[float, float, int]:
    """Set the adapter's factors, and the codes after more than one step; return errors before and after, and the step.

    The step with the smallest error is taken: requantizing is no projection, so a later one can be worse.
    """
    where = type(layer).__name__
    if dense.shape != weight.shape:
        raise CheckpointError(
            f"{where}: the unquantized weight is {tuple(dense.shape)}, the quantized one {tuple(weight.shape)}: name "
            "the model that was quantized"
        )
    layout, dense = weight.quant_layout, dense.to(weight.device, torch.float32)
    size = float(dense.norm()) or 1.0
    rank, scaling = layer.r[adapter], layer.scaling[adapter]
    parts: Mapping[str, Tensor] = weight.parts
    lost = dense - layout.dequantize(parts)
    before = float(lost.norm()) / size
    up, down = factors_of(lost, rank)
    best = float((lost - up @ down).norm()) / size, 1, parts, (up, down)
    for step in range(2, steps + 1):
        parts = layout.requantize(dense - up @ down, parts, "best")
        lost = dense - layout.dequantize(parts)
        up, down = factors_of(lost, rank)
        error = float((lost - up @ down).norm()) / size
        if error < best[0]:
            best = error, step, parts, (up, down)
    after, step, parts, (up, down) = best
    if step > 1:
        weight.data = weight._like(parts)
    root = scaling**0.5
    for held, factor in ((layer.lora_A[adapter].weight, down / root), (layer.lora_B[adapter].weight, up / root)):
        held.data = factor.to(held.dtype).contiguous()
    return before, after, step


# -- where the unquantized weights are ---------------------------------------------------------------------------------


def _weights(root: Any, dense: Any, stack: ExitStack) -> Callable[[str], Tensor]:
    """Return what gives the unquantized weight of a name; ``stack`` ends what it holds open."""
    if isinstance(dense, Mapping):
        return lambda name: _found(dense.get(name), name, "the weights given")
    if isinstance(dense, nn.Module):
        own = dict(dense.named_parameters(remove_duplicate=False))
        return lambda name: _found(own.get(name), name, f"the {type(dense).__name__} given")
    return _from_folder(str(dense if dense is not None else _origin(root)), stack)


def _found(weight: Any, name: str, where: str) -> Tensor:
    if weight is None:
        raise CheckpointError(f"{where} lack {name}: name the model that was quantized")
    if isinstance(weight, QuantizedTensor):
        raise CheckpointError(f"{name} of {where} is quantized itself: name the unquantized model")
    return weight.detach()


def _origin(root: Any) -> str:
    quantizer = getattr(root, "hf_quantizer", None)
    source = getattr(root, "name_or_path", "")
    if quantizer is None or getattr(quantizer, "pre_quantized", True) or not source:
        raise ConfigError(
            "LoftQ needs the unquantized weights, and this model was not quantized while it was loaded: call "
            "qhub.loftq_init(peft_model, dense=FOLDER) with the model that it was made from"
        )
    return source


def _from_folder(source: str, stack: ExitStack) -> Callable[[str], Tensor]:
    from transformers.integrations.accelerate import load_offloaded_parameter

    from qhub.integrations.transformers.folders import local_folder
    from qhub.integrations.transformers.streaming import open_on_disk

    offload = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qhub-loftq-")))
    origin = open_on_disk(local_folder(source, weights=True), "auto", offload, torch.device("cpu"))
    own = dict(origin.named_parameters(remove_duplicate=False))

    def weight(name: str) -> Tensor:
        held = _found(own.get(name), name, source)
        return load_offloaded_parameter(origin, name) if held.device.type == "meta" else held

    return weight


# -- init_lora_weights="loftq" -----------------------------------------------------------------------------------------


class _Injection:
    """Is a model while adapters are put on it."""

    def __init__(self, model: Any, stack: ExitStack) -> None:
        self._model = model
        self._stack = stack
        self._weights: Callable[[str], Tensor] | None = None

    def dense(self, layer: Any) -> Tensor:
        """Return the unquantized weight of the base of ``layer``."""
        if self._weights is None:
            self._weights = _weights(self._model, None, self._stack)
        base = layer.get_base_layer()
        name = next(name for name, module in self._model.named_modules() if module is base)
        return self._weights(f"{name.replace('.base_layer', '')}.weight")


_injection: ContextVar[_Injection | None] = ContextVar("qhub_injection", default=None)


@contextmanager
def injecting(model: Any) -> Iterator[None]:
    """Let :func:`init_layer` know, inside the block, the model whose layers are being adapted."""
    with ExitStack() as stack:
        token = _injection.set(_Injection(model, stack))
        try:
            yield
        finally:
            _injection.reset(token)


@torch.no_grad()
def init_layer(layer: Any, original: Callable[..., None], adapter_name: str, config: Any) -> None:
    """Do what ``original``, a LoRA layer's ``loftq_init``, does, without a GPU and on any method.

    On a quantized base the unquantized weights come from where the model was loaded from. A dense base is made what
    PEFT's ``LoftQConfig`` says: NF4 or int8 numbers, kept dense.
    """
    steps, bits = config.loftq_config["loftq_iter"], config.loftq_config["loftq_bits"]
    _check_steps(steps)
    weights = quantized_of(layer)
    if "weight" not in weights:
        plan = _bits_plan(layer, bits)
        if plan is None:
            original(adapter_name, config)
        else:
            _start_dense(layer, adapter_name, steps, *plan)
        return
    injection = _injection.get()
    if injection is None or adapter_name not in layer.lora_A:
        raise UnsupportedError(
            f"LoftQ cannot start {type(layer).__name__} here: put the adapter on the model with get_peft_model, or "
            "call qhub.loftq_init(peft_model, dense=FOLDER)"
        )
    weight = weights["weight"]
    before, after, step = _start(layer, adapter_name, weight, injection.dense(layer), steps)
    logger.info("LoftQ: relative error %.4f, with zeros %.4f, step %d", after, before, step)


def _bits_plan(layer: Any, bits: int) -> tuple[Any, LayerPlan, WeightInfo] | None:
    """Return the quantization that PEFT means by ``loftq_bits``; None where it is not installed or PEFT has none."""
    import transformers

    from qhub.config import method_of
    from qhub.quantizing import Quantization
    from qhub.registry import registry

    meant: dict[int, dict[str, Any]] = {
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        8: {"load_in_8bit": True},
    }
    given = meant.get(bits)
    weight = layer.get_base_layer().weight
    if given is None or weight.ndim != 2:
        return None
    config = transformers.BitsAndBytesConfig(**given)
    method = method_of(config)
    if method not in registry.list():
        return None
    info = WeightInfo("weight", weight.shape[0], weight.shape[1], weight.dtype)
    planned = registry.call(method, "qhub_plan", config=config, weights=[info], model_config=None)["weight"]
    return (Quantization(method, config), planned, info) if isinstance(planned, LayerPlan) else None


def _start_dense(layer: Any, adapter: str, steps: int, quantization: Any, planned: LayerPlan, info: WeightInfo) -> None:
    held = layer.get_base_layer().weight
    dense, product = held.detach().float(), torch.zeros(())
    for _ in range(steps):
        codes = quantization.parameter(info, planned, (dense - product).to(held.dtype)).dequantize(torch.float32)
        up, down = factors_of(dense - codes, layer.r[adapter])
        product = up @ down
    root = layer.scaling[adapter] ** 0.5
    layer.lora_A[adapter].weight.data = (down / root).to(layer.lora_A[adapter].weight.dtype)
    layer.lora_B[adapter].weight.data = (up / root).to(layer.lora_B[adapter].weight.dtype)
    held.data = codes.to(held.dtype)
