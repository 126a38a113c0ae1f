"""FP8Config: the vocabulary of Intel Neural Compressor's FP8 quantization, as a config of the method ``inc``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from qhub.config import MethodConfig
from qhub.errors import ConfigError
from qhub_fp8.inc.methods import DYNAMIC_ONLY, SCALE_METHODS, Method
from qhub_fp8.inc.scales import DEVICES, Device

__all__ = ["LINEAR_TYPES", "FP8Config"]

_CODES = {"E4M3": "e4m3fn", "E5M2": "e5m2"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MODES = ("AUTO", "MEASURE", "QUANTIZE", "LOAD")
_OBSERVERS = ("maxabs", "maxabs_per_channel")

# Types of modules that are linear layers in that library's tables (torch/algorithms/fp8_quant/model_configs.py); a
# transformers model on other hardware has the first two, and fused experts.
LINEAR_TYPES = frozenset(
    {
        "Linear", "Conv1D", "FalconLinear", "LinearAllreduce", "LinearLayer", "LmHeadLinearAllreduce",
        "LoRACompatibleLinear", "MixtralBlockSparseTop2MLP", "MoeMatmul", "ReplicatedLinear", "ScopedLinearAllReduce",
    }
)  # fmt: skip

# Written into config.json by that library, about itself.
_NOISE = frozenset(
    {
        "_json_file", "json_file", "global_config", "local_config", "local_rank", "name", "non_tunable_params",
        "params_list", "quantize_weight", "white_list", "world_size",
    }
)  # fmt: skip
_ALIASES = {"whitelist": "allowlist", "blacklist": "blocklist"}


@dataclass
class FP8Config(MethodConfig):
    """Says how a model is measured and quantized, in the words of ``neural_compressor.torch.quantization.FP8Config``.

    ``fp8_config``: ``"E4M3"`` or ``"E5M2"``, of weights and inputs. ``hp_dtype``: in which scales are computed and
    stored (``"bf16"``, ``"fp16"``, ``"fp32"``). ``scale_method``: a name of
    :data:`qhub_fp8.inc.methods.SCALE_METHODS`. ``blocklist``, ``allowlist``: ``{"names": [...], "types": [...]}``;
    names are searched for in a module's name as regular expressions, types are class names; an empty allowlist allows
    all. The output head stays in 16 bits unless the allowlist names it. ``mode``: ``"AUTO"``: ``prepare`` measures and
    ``convert`` quantizes; ``"MEASURE"``: measure only; ``"QUANTIZE"``: ``convert`` reads what was measured before;
    ``"LOAD"``: of a quantized model. ``dump_stats_path``: begins the names of the files with measurements.
    ``observer``: ``"maxabs"`` or ``"maxabs_per_channel"``: what those files hold. ``dynamic_quantization``: inputs'
    scales are found anew for each input. ``device_for_scales``: ``"GAUDI2"`` (None: that) or ``"GAUDI3"``: whose
    range and scales the methods aim at. ``ignore_modules_wo_measures``: modules without measurements stay in 16 bits
    instead of being an error. ``dataset``, ``tokenizer``: what ``from_pretrained`` calibrates with; None: text that
    the model writes.

    ``use_qdq``: files have the names of that mode, the only one that the library itself has on a CPU; the numbers are
    the same.

    Without effect here, and kept: ``scale_format``, ``measure_exclude``, ``measure_on_hpu``, ``fake_quant`` (the
    numbers are the same), ``recalc_scales``, ``row_parallel_linear_allreduce_quantization``,
    ``calibration_sample_interval``, ``seperate_measure_files``. ``scale_params`` and ``mod_dict`` must be empty.

    Raises :class:`ConfigError` on any other value.
    """

    quant_method: ClassVar[str] = "inc"

    dump_stats_path: str = "./hqt_output/measure"
    fp8_config: str = "E4M3"
    hp_dtype: str = "bf16"
    blocklist: dict[str, Any] = field(default_factory=dict)
    allowlist: dict[str, Any] = field(default_factory=dict)
    mode: str = "AUTO"
    scale_method: str = "maxabs_hw"
    scale_params: dict[str, Any] = field(default_factory=dict)
    observer: str = "maxabs"
    mod_dict: dict[str, Any] = field(default_factory=dict)
    measure_exclude: str = "OUTPUT"
    fake_quant: Any = False
    use_qdq: Any = False
    scale_format: str = "scalar"
    measure_on_hpu: Any = True
    dynamic_quantization: Any = False
    device_for_scales: str | None = None
    ignore_modules_wo_measures: Any = False
    recalc_scales: Any = False
    row_parallel_linear_allreduce_quantization: Any = False
    calibration_sample_interval: int = 0
    seperate_measure_files: Any = True
    dataset: Any = field(default=None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.mode = _choice("mode", self.mode, _MODES)
        self.fp8_config = _choice("fp8_config", self.fp8_config, _CODES)
        self.hp_dtype = _choice("hp_dtype", self.hp_dtype, _DTYPES)
        self.scale_method = _choice("scale_method", self.scale_method, SCALE_METHODS)
        self.observer = _choice("observer", self.observer, _OBSERVERS)
        self.scale_format = _choice("scale_format", self.scale_format, ("scalar", "const"))
        self.measure_exclude = _choice("measure_exclude", self.measure_exclude, ("OUTPUT", "NONE"))
        if self.device_for_scales is not None:
            self.device_for_scales = _choice("device_for_scales", self.device_for_scales, DEVICES)
        for name in (
            "fake_quant", "use_qdq", "measure_on_hpu", "dynamic_quantization", "ignore_modules_wo_measures",
            "recalc_scales", "row_parallel_linear_allreduce_quantization", "seperate_measure_files",
        ):  # fmt: skip
            setattr(self, name, _truth(name, getattr(self, name)))
        self.blocklist = _listing("blocklist", self.blocklist)
        self.allowlist = _listing("allowlist", self.allowlist)
        for name in ("scale_params", "mod_dict"):
            if getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r} of an inc config: qhub has no use for it, leave it")
        if not isinstance(self.dump_stats_path, str) or not self.dump_stats_path:
            raise ConfigError(f"dump_stats_path={self.dump_stats_path!r} of an inc config: it begins a file's name")
        listed = self.modules_to_not_convert
        if listed is not None and not (isinstance(listed, list) and all(isinstance(one, str) for one in listed)):
            raise ConfigError(f"modules_to_not_convert={listed!r} of an inc config: it is a list of names")
        if self.scale_method in DYNAMIC_ONLY and not self.dynamic_quantization:
            raise ConfigError(
                f"scale_method={self.scale_method!r} of an inc config has a scale for each token: it needs "
                "dynamic_quantization=True"
            )
        if self.dynamic_quantization and (self.method.activation.fixed or self.method.activation.rounding == "hw"):
            raise ConfigError(
                f"scale_method={self.scale_method!r} of an inc config: its inputs' scales are fixed or the hardware's, "
                "which dynamic_quantization=True cannot give"
            )

    # -- what it says ------------------------------------------------------------------------------------------------

    @property
    def method(self) -> Method:
        """Return the rules of the scale method."""
        return SCALE_METHODS[self.scale_method]

    @property
    def codes(self) -> str:
        """Return the float8 format by torch's name."""
        return _CODES[self.fp8_config]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of scales."""
        return _DTYPES[self.hp_dtype]

    @property
    def device(self) -> Device:
        """Return the hardware whose range and scales are aimed at."""
        return DEVICES[self.device_for_scales or "GAUDI2"]

    @property
    def measures(self) -> bool:
        """Return whether inputs have to be measured: their scales are stored and not fixed."""
        return not self.dynamic_quantization and not self.method.activation.fixed

    @property
    def quantizes_head(self) -> bool:
        """Return whether the allowlist asks for the output head."""
        return any(re.search(name, "lm_head") for name in self.allowlist["names"])

    def blocked(self, module: str, kind: str) -> str | None:
        """Return why the lists leave ``module`` alone; None when they do not. ``kind``: its class.

        Source: ``should_quantize`` of torch/algorithms/fp8_quant/_core/utils.py.
        """
        if kind in self.blocklist["types"]:
            return f"its type {kind} is in blocklist"
        for name in self.blocklist["names"]:
            if re.search(name, module):
                return f"{name!r} is in blocklist"
        names, types = self.allowlist["names"], self.allowlist["types"]
        if not names and not types:
            return None
        if kind in types or any(re.search(name, module) for name in names):
            return None
        return "neither its name nor its type is in allowlist"

    # -- as data -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return a config from plain data; what that library writes about itself is left out."""
        kept = {_ALIASES.get(name, name): value for name, value in values.items() if name not in _NOISE}
        return super().from_dict(kept, return_unused_kwargs, **kwargs)

    @classmethod
    def from_json_file(cls, filename: str | Path) -> FP8Config:
        """Return the config of a JSON file."""
        values = json.loads(Path(filename).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ConfigError(f"{filename} holds no dictionary: an inc config is one")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data, without calibration data."""
        held = self.dataset, self.tokenizer
        self.dataset = self.tokenizer = None
        try:
            values = super().to_dict()
        finally:
            self.dataset, self.tokenizer = held
        return {name: value for name, value in values.items() if name not in ("dataset", "tokenizer")}


def _choice(name: str, value: Any, allowed: Any) -> str:
    """Return the one of ``allowed`` that ``value`` is, upper and lower case alike."""
    by_lower = {one.lower(): one for one in allowed}
    text = getattr(value, "name", value)
    if not isinstance(text, str) or text.lower() not in by_lower:
        raise ConfigError(f"{name}={value!r} of an inc config: it is one of {', '.join(by_lower.values())}")
    return by_lower[text.lower()]


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ConfigError(f"{name}={value!r} of an inc config: it is true or false")


def _listing(name: str, value: Any) -> dict[str, list[str]]:
    if not isinstance(value, Mapping) or set(value) - {"names", "types"}:
        raise ConfigError(f"{name}={value!r} of an inc config: it is {{'names': [...], 'types': [...]}}")
    found = {}
    for key in ("names", "types"):
        listed = value.get(key) or []
        if not isinstance(listed, (list, tuple, set)) or not all(isinstance(one, str) for one in listed):
            raise ConfigError(f"{name}[{key!r}]={listed!r} of an inc config: it is a list of strings")
        found[key] = list(listed)
    for pattern in found["names"]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{name} of an inc config, {pattern!r} is no regular expression: {error}") from error
    return found
