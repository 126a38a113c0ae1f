"""Reads the keys of one architecture from a file, and what most decoders share."""

from __future__ import annotations

import struct
from typing import Any

from qhub.errors import CheckpointError
from qhub_gguf.container import GgufFile
from qhub_gguf.metadata.rope import llama3_settings
from qhub_gguf.names import architecture_of

__all__ = ["Config", "Model", "decoder", "head_dim", "set_partial"]

Config = dict[str, Any]


class Model:
    """Reads the keys of one architecture from a file."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.architecture = file, architecture_of(file)
        self.prefix = str(file.get("general.architecture"))

    def check_sizes(self) -> None:
        """Refuse sizes that no tensor of the file can have, before a model is built from them.

        Buffers of a model may be allocated after what its config says. Raises :class:`CheckpointError` naming the key.
        """
        tensors = self.file.tensors.values()
        largest = _SLACK * max((size for info in tensors for size in info.shape), default=0)
        limits = dict.fromkeys(_SIZES, largest)
        limits |= dict.fromkeys(("block_count", "decoder_block_count", "nextn_predict_layers"), len(self.file.tensors))
        for key, limit in limits.items():
            value = self.get(key)
            sizes = value if isinstance(value, list) else [value]
            if tensors and any(isinstance(size, int) and size > limit for size in sizes):
                raise CheckpointError(
                    f"{self.file.path}: {self.prefix}.{key} is {str(value)[:60]}, and no tensor of the file is of that "
                    "size: the file is damaged"
                )

    def get(self, key: str, default: Any = None) -> Any:
        """Return ``{architecture}.{key}`` or ``default``."""
        value = self.file.get(f"{self.prefix}.{key}", default)
        return _shortest(value) if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        """Return ``{architecture}.{key}``; :class:`CheckpointError` where it is missing."""
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.file.path}: the metadata key {self.prefix}.{key!s} is missing")
        return value

    def integer(self, key: str) -> int:
        """Return a compulsory count, which some files give per layer: then the largest."""
        value = self.need(key)
        if isinstance(value, list) and value and all(isinstance(number, int) for number in value):
            value = max(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{self.file.path}: {self.prefix}.{key} must be a count, found {str(value)[:60]}")
        return value

    def get_whole(self, key: str, default: int) -> int:
        """Return the number of elements of the array ``key``."""
        value = self.file.metadata.get(key)
        return default if value is None else value.count

    def has(self, tensor: str) -> bool:
        """Return whether the file has the tensor."""
        return tensor in self.file.tensors

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the tensor's shape; empty where the file does not have it."""
        info = self.file.tensors.get(tensor)
        return info.shape if info is not None else ()

    def any(self, ending: str) -> bool:
        """Return whether any tensor's name ends so."""
        return any(name.endswith(ending) for name in self.file.tensors)


# What a file says of its sizes, and a model is built from before any weight is read.
_SIZES = (
    "embedding_length",
    "embedding_length_per_layer_input",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.relative_buckets_count",
    "rope.dimension_count",
    "rope.dimension_count_swa",
    "shortconv.l_cache",
    "ssm.conv_kernel",
    "ssm.state_size",
    "ssm.group_count",
    "ssm.time_step_rank",
    "ssm.inner_size",
)
# GPT-2's inner width is written as four times the outer one whatever it is.
_SLACK = 8


def _shortest(number: float) -> float:
    """Return the shortest decimal that is the same FLOAT32: 1e-06 instead of 9.999999974752427e-07."""
    exact = struct.pack("<f", number)
    return next(
        (short for digits in range(1, 9) if struct.pack("<f", short := float(f"{number:.{digits}g}")) == exact), number
    )


def decoder(model: Model) -> Config:
    """Read what most decoders share."""
    config: Config = {
        "num_hidden_layers": model.integer("block_count"),
        "max_position_embeddings": model.get("context_length"),
        "hidden_size": model.integer("embedding_length"),
        "num_attention_heads": model.integer("attention.head_count"),
        "intermediate_size": model.integer("feed_forward_length") if model.get("feed_forward_length") else None,
    }
    if model.get("attention.head_count_kv") is not None:
        config["num_key_value_heads"] = model.integer("attention.head_count_kv")
    if model.get("attention.key_length") is not None:
        config["head_dim"] = model.integer("attention.key_length")
    eps = model.get("attention.layer_norm_rms_epsilon")
    if eps is not None:
        config["rms_norm_eps"] = eps
    config["rope_parameters"] = _rope(model, config)
    return {key: value for key, value in config.items() if value is not None}


def _rope(model: Model, config: Config) -> Config:
    theta = model.get("rope.freq_base", 10000.0)
    rope: Config = {"rope_type": "default", "rope_theta": theta}
    kind, factor = model.get("rope.scaling.type", "none"), model.get("rope.scaling.factor")
    if kind in ("linear", "yarn") and factor:
        rope |= {"rope_type": kind, "factor": factor}
    if rope["rope_type"] == "yarn":
        for ours, theirs in (
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if model.get(f"rope.scaling.{ours}") is not None:
                rope[theirs] = model.get(f"rope.scaling.{ours}")
    if model.has("rope_freqs.weight") and model.architecture in ("llama", "deci"):
        factors = model.file.tensor("rope_freqs.weight")
        scaling = llama3_settings(factors, theta, config.get("max_position_embeddings") or 0)
        if bool((factors == 1).all()):
            scaling = {}
        if scaling is None:
            raise CheckpointError(
                f"{model.file.path}: tensor 'rope_freqs.weight' is no scaling of rotary embeddings that transformers "
                "has (it is not Llama 3's)"
            )
        rope |= scaling
    return rope


def set_partial(model: Model, config: Config, head_dim: int) -> None:
    """Say which part of each head is turned."""
    turned = model.get("rope.dimension_count")
    if turned and turned != head_dim:
        config["partial_rotary_factor"] = config["rope_parameters"]["partial_rotary_factor"] = turned / head_dim


def head_dim(config: Config) -> int:
    """Return the size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
