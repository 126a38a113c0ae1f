"""Which keys and values a GPTQ config may hold, and what it asks of the calibration and of the solver."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError
from qhub_gptq.dynamic import BITS, rules_of

if TYPE_CHECKING:
    from qhub.layouts import Layout
    from qhub.reports import Finding
    from qhub_gptq.quantize import Options

__all__ = [
    "FORMATS", "OTHER_KEYS", "QUALITIES", "check", "findings", "quality_of", "solver_options", "spec",
]  # fmt: skip

FORMATS = ("gptq", "gptq_v2")

# "standard": GPTQ as published. "high": searched grids, a target that makes up for earlier layers' errors, and
# coordinate descent, in the same format.
QUALITIES = ("standard", "high")

# What config.json files hold besides the parameters of transformers' GPTQConfig. None of it changes how tensors are
# read, except the keys of _NEUTRAL below and ``dynamic``.
OTHER_KEYS = frozenset(
    {
        # this plugin: input embeddings are quantized too
        "embeddings",
        # gptqmodel 1 to 7: QuantizeConfig.to_dict (gptqmodel/quantization/config.py)
        "adapter", "damp_auto_increment", "device", "dynamic", "failsafe", "fallback", "foem", "gptaq", "hessian",
        "hyb_act", "lm_head", "method", "mse", "offload_to_disk", "offload_to_disk_path", "pack_dtype", "pack_impl",
        "parallel_packing", "rotation", "static_groups", "v2", "v2_alpha", "v2_memory_device",
        # AutoGPTQ: BaseQuantizeConfig.to_dict (auto_gptq/quantization/config.py)
        "awq_gemm_checkpoint", "is_marlin_format", "model_file_base_name", "model_name_or_path",
        # optimum and earlier transformers
        "disable_exllama", "exllama_config", "use_cuda_fp16", "use_exllama",
        # AutoRound's export to this format (auto_round/export/export_to_autogptq/export.py)
        "act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym", "amp", "autoround_version",
        "data_type", "enable_alg_ext", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input",
        "extra_config", "gradient_accumulate_steps", "iters", "low_cpu_mem_usage", "low_gpu_mem_usage", "lr",
        "minmax_lr", "nsamples", "provider", "quant_block_list", "quant_lm_head", "regex_config", "rotation_configs",
        "scale_dtype", "seqlen", "static_attention_dtype", "static_attention_granularity", "static_kv_dtype",
        "static_kv_granularity", "super_bits", "super_group_size", "supported_types", "to_quant_block_names",
        "train_bs",
    }
)  # fmt: skip

# gptqmodel's damp_auto_increment where none is given.
_INCREMENT = 0.01

# Keys that would change what the tensors mean, with the values under which they do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "method": ("gptq", None),
    "pack_dtype": ("int32", "torch.int32", None),
    "rotation": ("", None),
    "adapter": ({}, None),
    "is_marlin_format": (False, None),
    "awq_gemm_checkpoint": (False, None),
    "data_type": ("int", None),
    "act_bits": (16, 32, None),
    "rotation_configs": ([], None),
}


# gptqmodel takes asymmetric files of the first format from nobody but itself.
_HIGH = {"group_size": 128, "sym": False, "format": "gptq_v2", "quality": "high"}


def spec() -> ConfigSpec:
    """Return the description of transformers' GPTQConfig, for every key that its files hold."""
    return ConfigSpec(
        cls="qhub_gptq.gptq_config:GPTQConfig",
        keys=OTHER_KEYS | {"checkpoint_format", "quality"},
        embeddings="embeddings",
        check=check,
        head="lm_head",
        companion="quantize_config.json",
        presets={
            "4bit": {"bits": 4, "group_size": 128},
            "4bit-act-order": {"bits": 4, "group_size": 128, "desc_act": True},
            "4bit-high": {"bits": 4, **_HIGH},
            "3bit-high": {"bits": 3, **_HIGH},
            "2bit-high": {"bits": 2, **_HIGH},
            "8bit": {"bits": 8, "group_size": 128},
        },
    )


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on a value that this plugin cannot read a checkpoint with."""
    if type(config.bits) is not int or config.bits not in BITS:
        raise ConfigError(f"bits={config.bits!r} of a gptq config: it is one of {BITS}")
    group = config.group_size
    if type(group) is not int or (group != -1 and group < 1):
        raise ConfigError(f"group_size={group!r} of a gptq config: it is at least 1, or -1 for whole rows")
    for name in ("desc_act", "sym", "static_groups"):
        value = getattr(config, name, None)
        if not isinstance(value, bool) and not (value is None and name == "static_groups"):
            raise ConfigError(f"{name}={value!r} of a gptq config: it is true or false")
    if quality_of(config) not in QUALITIES:
        raise ConfigError(f"quality={quality_of(config)!r} of a gptq config: it is one of {QUALITIES}")
    increment = getattr(config, "damp_auto_increment", None)
    if increment is not None and (type(increment) not in (int, float) or not 0 <= increment < 1):
        raise ConfigError(f"damp_auto_increment={increment!r} of a gptq config: it is at least 0 and below 1")
    if config.format not in FORMATS:
        raise ConfigError(
            f"format={config.format!r} of a gptq config: this plugin reads and writes {' and '.join(FORMATS)}. "
            "gptqmodel converts others to these"
        )
    for name, allowed in _NEUTRAL.items():
        value = getattr(config, name, None)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ConfigError(
                f"{name}={value!r} of a gptq config: this plugin reads checkpoints with {name}={allowed[0]!r} only"
            )
    rules_of(config)
    inside = config.modules_in_block_to_quantize
    if inside is not None and not (
        isinstance(inside, (list, tuple))
        and all(isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names) for names in inside)
    ):
        raise ConfigError(
            f"modules_in_block_to_quantize={inside!r} of a gptq config: it is a list of lists of module names"
        )


def quality_of(config: Any) -> Any:
    """Return the config's ``quality``, kept under ``meta``; "standard" where none is given."""
    return (config.meta.get("quality") if isinstance(config.meta, dict) else None) or "standard"


def solver_options(config: Any, layout: Layout) -> Options:
    """Return how the solver works for one layer of ``layout``.

    A layout with a permutation was planned for act-order, without one it is either static groups or no act-order;
    ``act_group_aware`` (gptqmodel 7.7, transformers 5.23) orders what is left of the freedom there. ``mse``:
    gptqmodel's key for a search of scales; 0 turns it off, where nothing is said scales are searched.
    """
    from qhub_gptq.hessian import Damping
    from qhub_gptq.quantize import Options

    static, increment = bool(getattr(config, "static_groups", False)), getattr(config, "damp_auto_increment", None)
    features = bool(layout.transforms) or (static and config.desc_act)
    aware = bool(getattr(config, "act_group_aware", False))
    high = quality_of(config) == "high"
    return Options(
        order="features" if features else "groups" if aware else "natural",
        static_groups=static,
        damping=Damping(config.damp_percent, _INCREMENT if increment is None else float(increment)),
        search=high or getattr(config, "mse", None) != 0,
        high=high,
    )


def findings() -> Iterable[Finding]:
    """Return what ``qhub doctor`` says of GPTQ."""
    from qhub.reports import Finding

    message = "quantizes, loads, runs and saves GPTQ checkpoints without gptqmodel and optimum"
    others = [name for name in ("gptqmodel", "auto_gptq", "optimum") if importlib.util.find_spec(name) is not None]
    if others:
        message += f"; {' and '.join(others)} installed too, qhub does not use it"
    return [Finding("ok", "gptq", message)]
