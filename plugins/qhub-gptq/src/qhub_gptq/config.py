"""Which keys and values a GPTQ config may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError
from qhub_gptq.dynamic import BITS, rules_of

__all__ = ["FORMATS", "OTHER_KEYS", "check", "spec"]

FORMATS = ("gptq", "gptq_v2")

# What config.json files hold besides the parameters of transformers' GPTQConfig. None of it changes how tensors are
# read, except the keys of _NEUTRAL below and ``dynamic``.
OTHER_KEYS = frozenset(
    {
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


def spec() -> ConfigSpec:
    """Return the description of transformers' GPTQConfig, for every key that its files hold."""
    return ConfigSpec(cls="qhub_gptq.gptq_config:GPTQConfig", keys=OTHER_KEYS | {"checkpoint_format"}, check=check)


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on a value that this plugin cannot read a checkpoint with."""
    if type(config.bits) is not int or config.bits not in BITS:
        raise ConfigError(f"bits={config.bits!r} of a gptq config: it is one of {BITS}")
    group = config.group_size
    if type(group) is not int or (group != -1 and group < 1):
        raise ConfigError(f"group_size={group!r} of a gptq config: it is at least 1, or -1 for whole rows")
    for name in ("desc_act", "sym"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name}={getattr(config, name)!r} of a gptq config: it is true or false")
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
