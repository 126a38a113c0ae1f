"""Writes a model as a GGUF file: byte for byte the one it came from where nothing has changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhub.errors import CheckpointError, UnsupportedError
from qhub.formats.shards import byte_count
from qhub.layouts import Layout, Stacked
from qhub.layouts.blocks import Blocks
from qhub.tensor import QuantizedTensor
from qhub_gguf.container import TensorSource, write_like, write_split
from qhub_gguf.loading import GgufContainer, names_of
from qhub_gguf.names import Entry, architecture_of
from qhub_gguf.types import TYPES, type_of_dtype

__all__ = ["save"]

logger = logging.getLogger("qhub")


def save(
    config: Any, model: Any, folder: Path, container: GgufContainer | None, max_shard_size: int | str
) -> list[Path]:
    """Write ``model`` into ``folder``; ``container``: the file it was loaded from, None if it was quantized."""
    if container is None:
        return _new(config, model, folder / "model.gguf", byte_count(max_shard_size))
    else:
        names, prefix = names_of(model, architecture_of(container.file))
        state = _state(model)
        changed: dict[str, TensorSource] = {}
        for name, entries in names.of_file(container.file.tensors, prefix).items():
            if name in state:
                changed |= _changes(container, state[name], entries)
        plain = container.files[0].name if len(container.files) == 1 else "model.gguf"
        return write_like(folder / plain, container.file, changed)


def _state(model: Any) -> dict[str, Tensor]:
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in tied}
    quantized = {name: value for name, value in state.items() if isinstance(value, QuantizedTensor)}
    rest = {name: value.detach() for name, value in state.items() if name not in quantized}
    return {**remove_tied_weights_from_state_dict(rest, model), **quantized}


# -- the file it came from ---------------------------------------------------------------------------------------------


def _changes(container: GgufContainer, value: Tensor, entries: list[Entry]) -> dict[str, TensorSource]:
    """Return what to write instead of the file's own tensors for one parameter; {} where nothing has changed."""
    if isinstance(value, QuantizedTensor):
        written = {}
        for entry, blocks in zip(entries, _blocks_of(value, entries), strict=True):
            if not torch.equal(blocks.cpu(), container.file.tensor(entry.ggml)):
                info = container.file.tensors[entry.ggml]
                written[entry.ggml] = TensorSource(info.type.name, info.shape, blocks)
        return written
    origin = [container.dense(entry.ggml) for entry in entries]
    if torch.equal(Entry.assembled(entries, origin).to(value.dtype), value.cpu()):
        return {}
    written = {}
    for entry in entries:
        info = container.file.tensors[entry.ggml]
        dense = entry.to_file(value.cpu())
        if info.type.dtype is None:
            from qhub_gguf.records import record_of

            layout = Blocks(out_features=info.shape[-2], in_features=info.shape[-1], record=record_of(info.type.name))
            data = layout.fitted(dense.reshape(-1, info.shape[-1]))["blocks"]
        else:
            data = dense.to(info.type.dtype)
        written[entry.ggml] = TensorSource(info.type.name, info.shape, data)
    return written


def _blocks_of(value: QuantizedTensor, entries: list[Entry]) -> list[Tensor]:
    """Return the blocks of each tensor of the file that a packed parameter is made of, rows in the file's order."""
    weight: Any = value.transpose(-1, -2) if value.transposed else value
    pieces = _pieces(weight.quant_layout, weight.parts, entries)
    found = []
    for entry, blocks in zip(entries, pieces, strict=True):
        rows = entry.recipe.rows
        found.append(blocks if rows is None else blocks.index_select(-2, torch.argsort(rows).to(blocks.device)))
    return found


def _pieces(layout: Layout, parts: Mapping[str, Tensor], entries: list[Entry]) -> list[Tensor]:
    if isinstance(layout, Stacked):
        return [own["blocks"] for _, own in layout.each(parts)]
    if len(entries) == 1:
        return [parts["blocks"]]
    pieces = []
    for entry in entries:
        assert entry.recipe.part is not None
        pieces.append(entry.recipe.part.of(parts["blocks"]))
    return pieces


# -- a new file --------------------------------------------------------------------------------------------------------


def _new(config: Any, model: Any, path: Path, max_bytes: int) -> list[Path]:
    from qhub_gguf.metadata import metadata_of, size_label
    from qhub_gguf.mixes import file_type_of

    names, prefix = names_of(model)
    state = _state(model)
    tensors: dict[str, TensorSource] = {}
    for name, entries in names.of_model(state, prefix).items():
        tensors |= _sources(name, state[name], entries)
    tensors |= _computed(model)
    metadata = metadata_of(
        model.config,
        tokenizer=_tokenizer(model),
        file_type=file_type_of(config.file_type).number,
        name=Path(model.config.name_or_path or "").name or None,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        label=size_label(sum(parameter.numel() for parameter in model.parameters())),
    )
    return write_split(path, metadata, tensors, max_bytes)


def _computed(model: Any) -> dict[str, TensorSource]:
    """Return tensors that a file has and a model computes: frequencies of rotary embeddings."""
    from qhub_gguf.metadata import extra_tensors
    from qhub_gguf.names import architecture_of_config

    found = extra_tensors(model.config, architecture_of_config(model.config))
    return {name: TensorSource("F32", tuple(tensor.shape), tensor) for name, tensor in found.items()}


def _sources(name: str, value: Tensor, entries: list[Entry]) -> dict[str, TensorSource]:
    if isinstance(value, QuantizedTensor):
        bands = value.quant_layout.bands if isinstance(value.quant_layout, Stacked) else (value.quant_layout,)
        for band in bands:
            if not isinstance(band, Blocks):
                raise UnsupportedError(f"{name} is quantized, and not in blocks that GGUF has: it is {band.kind}")
        sources = {}
        for number, (entry, blocks) in enumerate(zip(entries, _blocks_of(value, entries), strict=True)):
            band = bands[number if len(bands) > 1 else 0]
            assert isinstance(band, Blocks)
            shape = (*blocks.shape[:-1], band.in_features)
            sources[entry.ggml] = TensorSource(band.record.name, shape, blocks)
        return sources
    return {entry.ggml: _dense_source(entry, entry.to_file(value.cpu())) for entry in entries}


def _dense_source(entry: Entry, tensor: Tensor) -> TensorSource:
    # llama.cpp wants vectors, and what its kernels add or multiply elementwise, in 32 bits.
    matrix = tensor.ndim > 1 and entry.recipe.change is None and entry.recipe.axis is None
    kind = type_of_dtype(tensor.dtype) if matrix else TYPES["F32"]
    if kind is None or kind.dtype is None:
        raise CheckpointError(f"{entry.hf} has dtype {tensor.dtype}, which GGUF does not have")
    return TensorSource(kind.name, tuple(tensor.shape), tensor.to(kind.dtype))


def _tokenizer(model: Any) -> Any:
    """Return the tokenizer that lies where the model came from; None, with a warning, if there is none."""
    from transformers import AutoTokenizer

    place = model.config.name_or_path or getattr(model, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.warning(
            "the GGUF file gets no tokenizer, without which llama.cpp does not load it: none was found in %r (%s)",
            place,
            error,
        )
        return None
