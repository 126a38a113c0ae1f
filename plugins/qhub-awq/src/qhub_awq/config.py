"""Which keys and values an AWQ config may hold, and what it asks of the calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError

__all__ = ["FORMATS", "KNOWN_KEYS", "OTHER_KEYS", "check", "spec"]

FORMATS = ("gemm", "gemv", "gemv_fast", "llm-awq")

# Parameters of transformers' AwqConfig, those that it passes on to its GPTQConfig, and three names of the format.
KNOWN_KEYS = frozenset(
    {
        "act_group_aware", "backend", "batch_size", "bits", "block_name_to_quantize", "cache_block_outputs",
        "checkpoint_format", "damp_percent", "dataset", "desc_act", "format", "group_size", "max_input_length", "meta",
        "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "modules_to_not_convert",
        "pad_token_id", "quant_method", "sym", "tokenizer", "true_sequential", "version", "zero_point",
    }
)  # fmt: skip

# What config.json files hold besides. None of it changes how tensors are read, except the keys of _NEUTRAL below and
# ``dynamic``.
OTHER_KEYS = frozenset(
    {
        # gptqmodel 1 to 7: QuantizeConfig.to_dict (gptqmodel/quantization/config.py)
        "adapter", "damp_auto_increment", "device", "dynamic", "failsafe", "fallback", "foem", "gptaq", "hessian",
        "hyb_act", "lm_head", "method", "mse", "offload_to_disk", "offload_to_disk_path", "pack_dtype", "pack_impl",
        "parallel_packing", "rotation", "static_groups", "v2", "v2_alpha",
        # autoawq and transformers up to 4 (AwqConfig of transformers/utils/quantization_config.py)
        "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse",
        # AutoRound's export to this format (auto_round/export/export_to_awq/export.py)
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
    "method": ("awq", None),
    "pack_dtype": ("int32", "torch.int32", "int16", "torch.int16", None),
    "rotation": ("", None),
    "adapter": ({}, None),
    "data_type": ("int", None),
    "act_bits": (16, 32, None),
    "rotation_configs": ([], None),
    "desc_act": (False, None),
}


def spec() -> ConfigSpec:
    """Return the description of transformers' AwqConfig, for every key that its files hold."""
    return ConfigSpec(
        cls="qhub_awq.awq_config:AwqConfig",
        keys=OTHER_KEYS | KNOWN_KEYS | {"q_group_size", "w_bit"},
        check=check,
        skip="modules_to_not_convert",
        # As transformers' own quantizer does (quantizers/quantizer_awq.py, add_default_skips).
        always_default_skip=True,
        presets={
            "4bit": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
            "4bit-g64": {"bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
            "4bit-sym": {"bits": 4, "group_size": 128, "zero_point": False, "version": "gemm"},
        },
    )


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on a value that AWQ's formats do not have."""
    from qhub_awq.plan import exclusions_of

    if type(config.bits) is not int or config.bits != 4:
        raise ConfigError(f"bits={config.bits!r} of an awq config: the formats of AWQ hold 4 bits and no other width")
    group = config.group_size
    if type(group) is not int or (group != -1 and group < 1):
        raise ConfigError(f"group_size={group!r} of an awq config: it is at least 1, or -1 for whole rows")
    if not isinstance(config.zero_point, bool):
        raise ConfigError(f"zero_point={config.zero_point!r} of an awq config: it is true or false")
    if config.format not in FORMATS:
        raise ConfigError(
            f"format={config.format!r} of an awq config: this plugin reads and writes {', '.join(FORMATS)}"
        )
    if config.format != "gemm" and group != -1 and group < 128 and group not in (32, 64):
        raise ConfigError(
            f"group_size={group} of an awq config: the format {config.format!r} has groups of 32, 64, 128 and more"
        )
    listed = config.modules_to_not_convert
    if listed is not None and not (isinstance(listed, (list, tuple)) and all(isinstance(one, str) for one in listed)):
        raise ConfigError(f"modules_to_not_convert={listed!r} of an awq config: it is a list of names")
    for name, allowed in _NEUTRAL.items():
        value = getattr(config, name, None)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ConfigError(f"{name}={value!r} of an awq config: this plugin knows {name}={allowed[0]!r} only")
    exclusions_of(config)
