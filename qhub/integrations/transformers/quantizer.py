"""The one HfQuantizer that serves every plugin: plans, quantizes on the fly, loads, dequantizes. It knows no method."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.quantizers.base import HfQuantizer

from qhub.calibration import CalibrationReport
from qhub.calibration.engine import Progress
from qhub.errors import CheckpointError, ConfigError, QhubError, UnsupportedError
from qhub.integrations import accelerate, peft
from qhub.integrations.transformers import companions, optimizers, routing
from qhub.integrations.transformers.checkpoint import FileTensor, read_headers
from qhub.integrations.transformers.container_loading import ReadsContainers
from qhub.integrations.transformers.conversions import Ready
from qhub.integrations.transformers.experts import choose_experts
from qhub.integrations.transformers.fusing import put_fused, undo_fused
from qhub.integrations.transformers.memory import Releaser
from qhub.integrations.transformers.recording import record_config, take_passengers
from qhub.integrations.transformers.saving import entries_of_model
from qhub.integrations.transformers.weights import (
    find_weights,
    put_layers,
    undo_layers,
    untie_head,
)
from qhub.plan import LayerPlan, Skip, WeightInfo, matches
from qhub.quantizing import Quantization
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

__all__ = ["PluginQuantizer", "quantizer_for"]

logger = logging.getLogger("qhub")


@cache
def quantizer_for(name: str, replaces: bool) -> type[PluginQuantizer]:
    """Return the quantizer class for the plugin ``name``; ``replaces``: transformers has one of its own for that
    name."""
    return type(f"PluginQuantizer_{name}", (PluginQuantizer,), {"method": name, "replaces": replaces})


@cache
def _say_once(message: str) -> None:
    logger.info(message)


class PluginQuantizer(ReadsContainers, HfQuantizer):
    """Quantizes and loads a model with the plugin :attr:`method`.

    ``plan``: {parameter: LayerPlan} of the model it worked on. ``skipped``: {parameter: reason}. ``calibration``: what
    quantizing with statistics found; None for methods without. ``passengers``: {key: tensor} of the checkpoint that the
    model has no place for.
    """

    method: str
    replaces: bool

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        self.spec = registry.call(self.method, "qhub_config")
        quantization_config = self.spec.adopt(quantization_config)
        super().__init__(quantization_config, **kwargs)
        self.plan: dict[str, LayerPlan] = {}
        self.skipped: dict[str, str] = {}
        self.untied: dict[str, list[str]] = {}
        self._headers: dict[str, FileTensor] = {}
        self._weights: dict[str, WeightInfo] = {}
        self._model: Any = None
        self._failure: QhubError | None = None
        self._loaded = False
        self.quantization = Quantization(self.method, quantization_config)
        self.calibration: CalibrationReport | None = None
        self.passengers: dict[str, Tensor] = {}
        if self.replaces:
            info = registry.list()[self.method]
            _say_once(
                f"{self.method}: served by the plugin {info.distribution} {info.version}; QHUB_NATIVE={self.method} "
                "gives it back to transformers"
            )

    # -- what transformers asks --------------------------------------------------------------------------------------

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is None and self.spec.prefers_accelerator and torch.accelerator.is_available():
            return {"": torch.accelerator.current_accelerator()}
        return super().update_device_map(device_map)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.plan and not self.calibrates

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        planned = self.plan.get(param_name)
        if planned is None or self.calibrates:
            return param.element_size()
        layout = planned.layout
        size = sum(
            torch.Size(spec.shape).numel() * spec.dtypes[0].itemsize
            for spec in layout.part_specs().values()
            if spec.batched
        )
        return size / (layout.out_features * layout.in_features)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        # 5.18 and later ask before casting what they read; entries of a quantized matrix are taken as they are.
        return None if isinstance(converter, routing.Router) else super().get_new_dtype(converter, param, dtype)

    # -- before loading ----------------------------------------------------------------------------------------------

    def preprocess_model(
        self, model: Any, dtype: Any = None, device_map: Any = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        model.is_quantized = True
        # Not the bare name: transformers' own `model.to()` imports hqq, refuses dtypes, ... for names that it knows.
        model.quantization_method = f"qhub/{self.method}"
        self._model = weakref.proxy(model)
        if self.container is not None:
            # In the place of transformers' own object for the file.
            model.config.quantization_config = self.quantization_config
        elif checkpoint_files:
            self._headers = read_headers(checkpoint_files)
        self.releaser = Releaser({tensor.file for tensor in self._headers.values()})
        if self.pre_quantized:
            if self.container is None:
                fmt = registry.call(self.method, "qhub_format", config=self.quantization_config)
                put_fused(model, self._headers, fmt)
            self._weights = find_weights(model, self._takes_embeddings())
            self._notice_skips(model, device_map)
            if self.container is not None:
                self.take_container(model, self._weights)
                self._settle_skips()
            return
        if self.spec.untie and self._takes_embeddings() and getattr(self.quantization_config, self.spec.untie, False):
            self.untied = untie_head(model)
        self.plan_for(model, device_map)
        self._check_disk(device_map)
        if not self.calibrates:
            put_layers(model, (self._weights[name] for name in self.plan))

    def _notice_skips(self, model: Any, device_map: Any) -> None:
        config, spec = self.quantization_config, self.spec
        patterns: dict[str, str] = {}
        given = getattr(config, spec.skip, None) if spec.skip else None
        if spec.default_skip and (given is None or spec.always_default_skip):
            # The output head, tied weights and the last module: transformers' own rule.
            left = set(self.get_modules_to_not_convert(model, None)) - self._wanted_head(model) - self._wanted_table()
            patterns |= dict.fromkeys(sorted(left), "output head or tied weight")
        patterns |= dict.fromkeys(given or [], f"listed in {spec.skip}")
        patterns |= dict.fromkeys(model._keep_in_fp32_modules or [], "the model keeps it in float32")
        heads = [name.removesuffix(".weight") for names in self.untied.values() for name in names]
        patterns |= dict.fromkeys(heads, f"{spec.untie}: it keeps the dense table")
        if spec.offload_skip and getattr(config, spec.offload_skip, False) and isinstance(device_map, dict):
            away = [module for module, place in device_map.items() if place in ("cpu", "disk")]
            patterns |= dict.fromkeys(
                away,
                f"{spec.offload_skip}: device_map puts it on {'/'.join(sorted({str(device_map[a]) for a in away}))}",
            )
        for name, info in self._weights.items():
            # Fused experts are parameters of their own: a pattern may name them, or the module that holds them.
            pattern = matches(info.module, patterns)
            if pattern is None and info.kind == "experts":
                pattern = matches(name.rpartition(".")[0], patterns)
            if pattern is not None:
                self.skipped[name] = patterns[pattern]

    def _takes_embeddings(self) -> bool:
        if self.container is not None:
            return self.container.embeddings
        return bool(self.spec.embeddings and getattr(self.quantization_config, self.spec.embeddings, False))

    def _wanted_table(self) -> set[str]:
        """Return the input embeddings' module if the config asks for them to be quantized."""
        return {info.module for info in self._weights.values() if info.kind == "embedding"}

    def _wanted_head(self, model: Any) -> set[str]:
        """Return the output head's name if the config asks for it to be quantized too."""
        if not self.spec.head or not getattr(self.quantization_config, self.spec.head, False):
            return set()
        head = model.get_output_embeddings()
        names = {name for name, module in model.named_modules() if module is head}
        if any(f"{name}.weight" in getattr(model, "all_tied_weights_keys", {}) for name in names):
            if self._takes_embeddings() or self.container is not None:
                return set()
            raise ConfigError(
                f"{self.spec.head}=True: the output head of this {type(model).__name__} is its embedding (tied), which "
                "stays as it is: leave that setting out"
            )
        return names

    def _ask_plan(self, weights: list[WeightInfo]) -> dict[str, LayerPlan]:
        answer = self._call_plan(weights)
        if not isinstance(answer, Mapping):
            raise ConfigError(f"the plugin {self.method!r} gave no plan: qhub_plan returned {type(answer).__name__}")
        plan = {}
        for info in weights:
            planned = answer.get(info.name)
            if isinstance(planned, LayerPlan):
                plan[info.name] = planned
            else:
                self.skipped[info.name] = (
                    planned.reason if isinstance(planned, Skip) else f"{self.method} planned nothing for it"
                )
        return plan

    def _check_disk(self, device_map: Any) -> None:
        if not isinstance(device_map, dict):
            return
        away = [module for module, place in device_map.items() if place == "disk"]
        on_disk = [name for name in self.plan if matches(name, away) or "" in away]
        if on_disk:
            raise ConfigError(
                f"device_map puts {len(on_disk)} quantized weights on the disk ({on_disk[0]}, ...): quantized "
                "weights can be offloaded to the CPU, not to the disk. Map those modules to 'cpu', or leave them "
                "unquantized"
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        if self.container is not None:
            # Its tensors have the model's own names; after loading nothing of them has to be reversed.
            return weight_conversions if self._loaded else [Ready(self._state)]
        if not self.pre_quantized or self._loaded:
            # Asked again after loading, for an adapter's weights.
            return weight_conversions
        if not self._headers:
            raise UnsupportedError(
                f"a checkpoint quantized with {self.method} is loaded from files, not from a state_dict: save it to "
                "a folder and name that"
            )
        fmt = registry.call(self.method, "qhub_format", config=self.quantization_config)
        model = self._model
        self.passengers = take_passengers(model, self._headers, fmt)
        routes = routing.find_routes(model, self._weights, self._headers, weight_conversions, fmt)
        if not routes:
            eligible = [name for name in self._weights if name not in self.skipped]
            some = ", ".join(list(self._headers)[:4])
            raise CheckpointError(
                f"config.json says that this checkpoint is quantized with {self.method}, but no tensor in it is "
                f"stored that way: expected {len(eligible)} weights with entries like {sorted(fmt.markers)}, found "
                f"{some}, ... Is the method's name right? No model was loaded"
            )
        infos = [source.info for route in routes for source in route.sources]
        routing.plan_sources(routes, self._call_plan(infos), fmt, self.method)
        for route in routes:
            plan = route.sources[0].plan
            assert plan is not None
            self.plan[route.target.name] = plan
        self._settle_skips()
        put_layers(model, (self._weights[name] for name in self.plan))
        renamings = [c for c in weight_conversions if isinstance(c, WeightRenaming)]

        def build(source: routing.Source, entries: dict[str, Tensor], dtype: torch.dtype) -> QuantizedTensor:
            assert source.plan is not None
            return routing.build_weight(source, entries, dtype, fmt, self.quantization.policy(source.plan.layout))

        # First among the conversions: at most one may match a key.
        return [routing.Router(routes, renamings, build), *weight_conversions]

    def _settle_skips(self) -> None:
        """Make :attr:`skipped` what a checkpoint leaves out of :attr:`plan`."""
        for name in self._weights:
            if name in self.plan:
                self.skipped.pop(name, None)
            else:
                self.skipped.setdefault(name, "stored unquantized in the checkpoint")

    def _call_plan(self, infos: list[WeightInfo]) -> Mapping[str, Any]:
        model_config = getattr(self._model, "config", None)
        return registry.call(
            self.method, "qhub_plan", config=self.quantization_config, weights=infos, model_config=model_config
        )

    # -- on the fly --------------------------------------------------------------------------------------------------

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def quantize(self, name: str, weight: Tensor) -> QuantizedTensor:
        """Return the quantized weight ``name`` for its dense values, as the model holds them, without statistics.

        Raises :class:`CheckpointError` when they are not finite.
        """
        return self.quantization.parameter(self._weights[name], self.plan[name], weight)

    # -- with statistics ---------------------------------------------------------------------------------------------

    @property
    def calibrates(self) -> bool:
        """Return whether any planned weight needs statistics of its inputs: then all are quantized after loading."""
        return not self.pre_quantized and any(planned.statistics for planned in self.plan.values())

    def plan_for(self, model: Any, device_map: Any = None) -> None:
        """Fill :attr:`plan` and :attr:`skipped` for a dense ``model``.

        Raises :class:`ConfigError` when nothing is left to quantize, :class:`UnsupportedError` when the plugin does not
        quantize.
        """
        if not registry.has(self.method, "qhub_quantize"):
            raise UnsupportedError(
                f"the plugin {self.method!r} loads and runs checkpoints but does not quantize: load one that is "
                f"quantized with {self.method} already, or choose another method"
            )
        self._model = weakref.proxy(model)
        self._weights = find_weights(model, self._takes_embeddings())
        self._notice_skips(model, device_map)
        self.plan = self._ask_plan([info for name, info in self._weights.items() if name not in self.skipped])
        if not self.plan:
            raise ConfigError(
                f"nothing in this {type(model).__name__} is left to quantize with {self.method}: {len(self._weights)} "
                f"weights were found, and skipped for these reasons: {sorted(set(self.skipped.values()))}"
            )

    def planned_infos(self) -> dict[str, WeightInfo]:
        """Return what is known of each planned weight."""
        return {name: self._weights[name] for name in self.plan}

    def calibrate(self, model: Any, progress: Progress | None = None, **options: Any) -> None:
        """Quantize what was planned for a ``model`` in memory; ``options`` win over what the config says."""
        from qhub.integrations.transformers.calibrating import calibrate, options_of
        from qhub.integrations.transformers.workshops import LiveWorkshop

        chosen = options_of(self.method, self.quantization_config, **options)
        self.calibration = calibrate(model, self, chosen, LiveWorkshop(model), progress)

    # -- after loading -----------------------------------------------------------------------------------------------

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        if self._failure is not None:
            raise self._failure
        result = super().postprocess_model(model, **kwargs)
        if not self.pre_quantized:
            self.releaser.release()
        if self.calibrates:
            self.calibrate(model)
        self._headers, self._state, self._loaded = {}, {}, True
        self._mark(model)
        if not self.pre_quantized:
            record_config(model, self)
        elif getattr(self.quantization_config, "dequantize", False):
            self.dequantize(model)
        return result

    def adopt(self, model: Any) -> None:
        """Make a model that was quantized in memory one that saves, moves and dequantizes as a loaded one does."""
        self._loaded = True
        model.hf_quantizer = self
        model.config.quantization_config = self.quantization_config
        model.is_quantized = True
        model.quantization_method = f"qhub/{self.method}"
        record_config(model, self)
        self._mark(model)

    def _mark(self, model: Any) -> None:
        choose_experts(model)
        # Here, not at import: while transformers is being imported its Trainer may be half there.
        accelerate.watch()
        optimizers.watch()
        peft.watch()
        # peft's mark for "quantized: freeze it, leave its dtypes alone, prepare gradient checkpointing" that asks for
        # no other library (peft/utils/other.py, prepare_model_for_kbit_training).
        model.hqq_quantized = True
        logger.info("%s: %d weights quantized, %d left as they are", self.method, len(self.plan), len(self.skipped))
        for name, reason in self.skipped.items():
            logger.debug("%s not quantized: %s", name, reason)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        fmt = registry.call(self.method, "qhub_format", config=self.quantization_config)
        return entries_of_model(model, fmt)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        undo_layers(model, dtype or model.dtype)
        undo_fused(model)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        super().remove_quantization_config(model)
        companions.forget(model.config)
        model.hqq_quantized = False


class _Quantize(ConversionOps):
    """Is transformers' hook on a parameter that was just read: returns it quantized."""

    def __init__(self, quantizer: PluginQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> _Quantize:
        return self

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, nn.Parameter]:
        made: dict[str, nn.Parameter] = {}
        for name, found in input_dict.items():
            value = found[0] if isinstance(found, list) else found
            made[name] = self._one(name, value)
            made |= {head: nn.Parameter(value.clone()) for head in self.quantizer.untied.get(name, [])}
        return made

    def _one(self, name: str, value: Tensor) -> nn.Parameter:
        quantizer = self.quantizer
        if name not in quantizer.plan:
            return nn.Parameter(value, requires_grad=value.is_floating_point())
        if quantizer._failure is None:
            try:
                weight = nn.Parameter(quantizer.quantize(name, value), requires_grad=False)
                quantizer.releaser.done_with(value.nbytes)
                return weight
            except QhubError as error:
                # An exception here would be noted by transformers and the weight filled with random numbers. The first
                # one is raised when loading ends; what comes after it takes no memory.
                message = str(error) if name in str(error) else f"{name}: {error}"
                quantizer._failure = type(error)(message)
                quantizer._failure.__cause__ = error
        return nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="meta"), requires_grad=False)
