"""Which tensor of a file becomes which type: the mixes that llama.cpp calls Q4_K_M, IQ3_XS and so on.

Tensors that matter more (values of attention, the second matrix of the feed-forward net, the output head) get more
bits, some of them in some layers only. Source: ``llama_tensor_get_type_impl``, ``tensor_type_fallback``,
``tensor_allows_quantization`` and ``llama_ftype_get_default_type`` of llama.cpp, src/llama-quant.cpp (July 2026); the
tests compare with files that ``llama_model_quantize`` wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qhub.errors import ConfigError
from qhub_gguf.names import architecture_of_config
from qhub_gguf.types import TYPES

__all__ = ["FILE_TYPES", "FileType", "file_type_of", "types_for"]


@dataclass(frozen=True)
class FileType:
    """Describes a mix: its name, its number (``general.file_type``) and the type most tensors get."""

    name: str
    number: int
    default: str


FILE_TYPES: dict[str, FileType] = {
    name: FileType(name, number, default)
    for number, name, default in (
        (0, "F32", "F32"),
        (1, "F16", "F16"),
        (2, "Q4_0", "Q4_0"),
        (3, "Q4_1", "Q4_1"),
        (7, "Q8_0", "Q8_0"),
        (8, "Q5_0", "Q5_0"),
        (9, "Q5_1", "Q5_1"),
        (10, "Q2_K", "Q2_K"),
        (11, "Q3_K_S", "Q3_K"),
        (12, "Q3_K_M", "Q3_K"),
        (13, "Q3_K_L", "Q3_K"),
        (14, "Q4_K_S", "Q4_K"),
        (15, "Q4_K_M", "Q4_K"),
        (16, "Q5_K_S", "Q5_K"),
        (17, "Q5_K_M", "Q5_K"),
        (18, "Q6_K", "Q6_K"),
        (19, "IQ2_XXS", "IQ2_XXS"),
        (20, "IQ2_XS", "IQ2_XS"),
        (21, "Q2_K_S", "Q2_K"),
        (22, "IQ3_XS", "IQ3_S"),
        (23, "IQ3_XXS", "IQ3_XXS"),
        (24, "IQ1_S", "IQ1_S"),
        (25, "IQ4_NL", "IQ4_NL"),
        (26, "IQ3_S", "IQ3_S"),
        (27, "IQ3_M", "IQ3_S"),
        (28, "IQ2_S", "IQ2_XS"),
        (29, "IQ2_M", "IQ2_S"),
        (30, "IQ4_XS", "IQ4_XS"),
        (31, "IQ1_M", "IQ1_M"),
        (32, "BF16", "BF16"),
        (36, "TQ1_0", "TQ1_0"),
        (37, "TQ2_0", "TQ2_0"),
        (38, "MXFP4_MOE", "MXFP4"),
        (40, "Q1_0", "Q1_0"),
        (41, "Q2_0", "Q2_0"),
    )
}

# What people write for them.
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}

# Parts of names of tensors that are never quantized.
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "position_embd",
    "token_types",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "attn_rel_b.weight",
)

# Where a row is no multiple of the block.
_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# The first that is in a name decides.
_CATEGORIES = (
    ("attn_qkv.weight", "qkv"),
    ("attn_kv_b.weight", "kv_b"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "o"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)
_VALUES = frozenset(["v", "qkv", "kv_b"])
_EMBEDDINGS = frozenset(["token_embd.weight", "per_layer_token_embd.weight"])
_SMALLEST = frozenset(["IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M"])
_LAYER = re.compile(r"blk\.(\d+)\.")


def file_type_of(name: str | int) -> FileType:
    """Return the file type of that name (any case; ``Q4_K`` is ``Q4_K_M``) or number; :class:`ConfigError` if there is
    none."""
    if isinstance(name, int):
        found = next((kind for kind in FILE_TYPES.values() if kind.number == name), None)
    else:
        upper = name.upper()
        found = FILE_TYPES.get(_ALIASES.get(upper, upper))
    if found is None:
        raise ConfigError(f"there is no GGUF file type {name!r}; those that there are: {', '.join(FILE_TYPES)}")
    return found


def types_for(
    file_type: str | int,
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    overrides: Mapping[str, str] | None = None,
    importance: bool = False,
    architecture: str | None = None,
) -> dict[str, str]:
    """Return the type of every tensor, by its name in the file.

    ``config``: of the model (transformers). ``shapes``: of all tensors that will be written, torch's order (K last):
    the choice depends on which there are (without ``output.weight`` the embeddings are the output head too) and on
    their order by layer. ``overrides``: {regular expression searched in the name: type}; the first that matches wins;
    for tensors that can be quantized. ``importance``: whether there is an importance matrix, which moves a few choices.
    Tensors that are never quantized get F32. Raises :class:`ConfigError` for unknown types.
    """
    kind = file_type_of(file_type)
    named = [(_compiled(pattern), _known(name)) for pattern, name in (overrides or {}).items()]
    model = _Model.of(config, shapes, architecture, importance)
    chosen: dict[str, str] = {}
    for name in sorted(shapes, key=_order):
        shape = shapes[name]
        if not _quantizable(name, shape):
            chosen[name] = "F32"
            continue
        manual = next((type_name for pattern, type_name in named if pattern.search(name)), None)
        if manual is not None:
            chosen[name] = _fitting(manual, shape[-1])
        elif TYPES[kind.default].dtype is not None:
            chosen[name] = kind.default
        else:
            chosen[name] = _fitting(_mixed(kind.name, kind.default, name, shape, model), shape[-1])
    return {name: chosen[name] for name in shapes}


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error


def _known(name: str) -> str:
    if name.upper() not in TYPES:
        raise ConfigError(f"there is no ggml type {name!r}; those that there are: {', '.join(TYPES)}")
    return name.upper()


def _order(name: str) -> tuple[int, str]:
    """Return llama.cpp's order: by layer, then by name (``weight_name_comparer``)."""
    found = _LAYER.match(name)
    return (int(found[1]) if found else -1, name)


def _quantizable(name: str, shape: tuple[int, ...]) -> bool:
    # As ggml counts: leading ones are no dimensions.
    dims = list(shape)
    while len(dims) > 1 and dims[0] == 1:
        dims.pop(0)
    return len(dims) > 1 and name.endswith("weight") and not any(part in name for part in _KEPT)


def _fitting(name: str, row: int) -> str:
    if row % TYPES[name].count == 0:
        return name
    smaller = _FALLBACK.get(name, name)
    return smaller if row % TYPES[smaller].count == 0 else "F16"


@dataclass
class _Model:
    """Holds what the choice depends on, and counts the tensors of each kind that were chosen for."""

    architecture: str
    layers: int
    heads_per_kv: int
    experts: int
    tied: bool
    values: int
    importance: bool
    seen: dict[str, int] = field(default_factory=lambda: {"v": 0, "down": 0, "gate": 0, "up": 0})

    @classmethod
    def of(
        cls, config: Any, shapes: Mapping[str, tuple[int, ...]], architecture: str | None, importance: bool
    ) -> _Model:
        def get(*names: str) -> Any:
            return next((value for name in names if (value := getattr(config, name, None)) is not None), 0)

        heads, kv_heads = get("num_attention_heads", "n_head", "num_heads"), get("num_key_value_heads")
        if getattr(config, "model_type", None) == "falcon":
            kv_heads = 1 if config.multi_query and not config.new_decoder_architecture else config.num_kv_heads
        if "conv" in (getattr(config, "layer_types", None) or [])[:1]:
            kv_heads, heads = 1, 0  # The first layer has no attention: llama.cpp asks that one.
        layers = get("num_hidden_layers", "n_layer", "num_layers")
        return cls(
            architecture=architecture or (architecture_of_config(config) if config is not None else ""),
            layers=int(layers) or 1 + max((_order(name)[0] for name in shapes), default=0),
            heads_per_kv=int(heads) // int(kv_heads or heads or 1),
            experts=int(get("num_local_experts", "num_experts")),
            tied="output.weight" not in shapes,
            values=sum(_category(name) in _VALUES for name in shapes),
            importance=importance,
        )

    @property
    def shares_values(self) -> bool:
        """Return whether llama.cpp calls it a 70B model, whose heads share few values."""
        grouped = self.architecture in ("deci", "qwen2") or (self.architecture == "llama" and self.heads_per_kv > 1)
        return grouped and self.layers == 80


def _category(name: str) -> str | None:
    if name == "output.weight":
        return "output"
    if name in _EMBEDDINGS:
        return "embedding"
    return next((category for part, category in _CATEGORIES if part in name), None)


def _more_bits(layer: int, layers: int) -> bool:
    """Return whether a layer is among the first or last eighth, or every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _mixed(mix: str, default: str, name: str, shape: tuple[int, ...], model: _Model) -> str:
    """Return the type that the mix gives a tensor, and count it."""
    category = _category(name)
    if category == "output" or (model.tied and category == "embedding"):
        return _output(mix, default, shape[-1], model)
    if mix == "MXFP4_MOE":
        return "MXFP4" if len(shape) > 2 and shape[0] > 1 else "Q8_0"
    if category == "embedding":
        return _embedding(mix, default)
    if mix in _SMALLEST:
        return _smallest(mix, default, category, model)
    if category in _VALUES:
        return _values(mix, default, model)
    if category in ("k", "q"):
        return _keys(mix, default, category, model)
    if category == "down":
        return _down(mix, default, _layer(name, "down", model), model)
    if category == "o":
        return _attention_output(mix, default, model)
    if category in ("gate", "up"):
        layer = _layer(name, category, model)
        middle = model.layers // 8 <= layer < 7 * model.layers // 8
        return "IQ3_XXS" if mix == "IQ3_XS" and middle else default
    return default


def _layer(name: str, category: str, model: _Model) -> int:
    """Return the layer: counted, or of a mixture of experts read from the name."""
    layer = model.seen[category]
    model.seen[category] += 1
    return _order(name)[0] if model.experts > 1 else layer


def _output(mix: str, default: str, row: int, model: _Model) -> str:
    if mix == "MXFP4_MOE" or model.architecture == "falcon" or row % TYPES[default].count:
        return "Q8_0"
    if mix in _SMALLEST or mix == "IQ3_XXS":
        return "Q5_K"
    return default if default == "Q8_0" else "Q6_K"


def _embedding(mix: str, default: str) -> str:
    if mix in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
        return "Q2_K"
    if mix in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "IQ3_S"
    return "Q4_K" if mix in ("TQ1_0", "TQ2_0", "Q2_0") else default


def _smallest(mix: str, default: str, category: str | None, model: _Model) -> str:
    """Choose for the mixes of about two bits and less."""
    larger = mix in ("IQ2_S", "IQ2_M")
    if category in _VALUES:
        model.seen["v"] += 1
        if model.heads_per_kv >= 4 or model.experts >= 4:
            return "Q4_K"
        return "IQ3_S" if larger else "Q2_K"
    if category == "k" and model.experts == 8:
        return "Q4_K"
    if category == "down":
        first = model.seen["down"] < model.layers // 8
        model.seen["down"] += 1
        return ("IQ3_S" if larger else "Q2_K") if first else default
    if category == "o":
        if model.experts == 8:
            return "Q5_K"
        if mix in ("IQ1_S", "IQ1_M"):
            return "IQ2_XXS"
        return "IQ3_S" if larger else default
    return default


def _values(mix: str, default: str, model: _Model) -> str:
    """Choose for the values of attention (or q, k, v in one): small matrices that count much."""
    index, many = model.seen["v"], model.heads_per_kv >= 4
    model.seen["v"] += 1
    chosen = default
    if mix == "Q2_K":
        chosen = "Q4_K" if many else "Q3_K"
    elif mix == "IQ3_XXS":
        chosen = "Q4_K" if many else "IQ3_XXS" if model.importance else "IQ3_S"
    elif (mix in ("Q2_K_S", "IQ3_XS", "IQ3_S") and many) or mix == "IQ3_M":
        chosen = "Q4_K"
    elif mix == "Q3_K_M":
        chosen = "Q5_K" if index < 2 else "Q4_K"
    elif mix == "Q3_K_L" or (mix in ("IQ4_NL", "IQ4_XS") and many) or (mix == "Q4_K_S" and index < 4):
        chosen = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and _more_bits(index, model.values):
        chosen = "Q6_K"
    if model.shares_values and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if model.experts == 8 else chosen


def _keys(mix: str, default: str, category: str, model: _Model) -> str:
    if category == "k" and model.experts == 8:
        return "Q8_0"
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix, default)


def _down(mix: str, default: str, layer: int, model: _Model) -> str:
    """Choose for the second matrix of the feed-forward net."""
    layers, falcon = model.layers, model.architecture == "falcon"
    first, more = layer < layers // 8, _more_bits(layer, layers)
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q2_K_S":
        return "Q4_K" if first else default
    if mix == "IQ3_XXS" and not model.importance:
        return "Q4_K" if first else "Q3_K"
    if mix == "Q3_K_M":
        if layer < layers // 16:
            return "Q5_K"
        return "Q4_K" if not falcon or more else "Q3_K"
    if mix == "IQ3_M":
        return "Q4_K" if first or (model.experts == 8 and more) else default
    if mix == "Q3_K_L":
        return "Q4_K" if falcon else "Q5_K"
    if mix == "Q4_K_M" and falcon:
        return "Q6_K" if layer < layers // 16 else "Q5_K" if more else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more else default
    if mix in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if first and not model.importance else default
    if mix == "Q4_K_S":
        return "Q5_K" if first and not falcon else default
    if mix in ("Q4_0", "Q5_0") and model.importance and first:
        return "Q4_1" if mix == "Q4_0" else "Q5_1"
    return default


_EXPERTS_OUTPUT = frozenset(
    ["Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS"]
)


def _attention_output(mix: str, default: str, model: _Model) -> str:
    if model.architecture == "falcon":
        return "Q4_K" if mix == "Q3_K_L" else default
    if model.experts == 8:
        return "Q5_K" if mix in _EXPERTS_OUTPUT else default
    return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(mix, default)
