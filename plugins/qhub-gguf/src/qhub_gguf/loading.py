"""A GGUF file as the container of a transformers model: its tensors as the model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhub.errors import CheckpointError
from qhub.formats import Container, Packed
from qhub.layouts import Layout, Stacked, Transform
from qhub.layouts.blocks import Blocks
from qhub.plan import WeightInfo
from qhub_gguf.container import GgufFile
from qhub_gguf.names import Entry, architecture_of
from qhub_gguf.names import Mapping as Names
from qhub_gguf.records import record_of

__all__ = ["GgufContainer", "names_of"]

EMBEDDINGS = "token_embd.weight"


def names_of(model: Any, architecture: str | None = None) -> tuple[Names, bool]:
    """Return the names of ``model``'s tensors in a file, and whether its own have the prefix of a class with a head."""
    names = Names.for_config(model.config, architecture)
    return names, any(name.startswith(names.base_prefix) for name in model.state_dict())


class GgufContainer(Container):
    """Is an open GGUF file. ``dequantize``: whether every tensor is handed out dense."""

    def __init__(self, path: Path, dequantize: bool = False) -> None:
        self.file = GgufFile.open(path)
        self.files = tuple(self.file.paths)
        self.dequantize = dequantize

    @property
    def dtype(self) -> torch.dtype | None:
        dtypes = {info.type.dtype for info in self.file.tensors.values()}
        if None in dtypes:
            return None
        # Norms are kept in 32 bits beside 16-bit matrices.
        return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.float32)

    @property
    def embeddings(self) -> bool:
        info = self.file.tensors.get(EMBEDDINGS)
        return info is not None and info.type.dtype is None and not self.dequantize

    def parameters(self, model: Any, weights: Mapping[str, WeightInfo]) -> dict[str, Tensor | Packed]:
        names, prefix = names_of(model, architecture_of(self.file))
        own = model.state_dict()
        found: dict[str, Tensor | Packed] = {}
        for name, entries in names.of_file(self.file.tensors, prefix).items():
            if name not in own:
                # A class without the file's head has no place for it, as everywhere in transformers.
                if name.startswith("lm_head") or not prefix:
                    continue
                if name in getattr(model, "all_tied_weights_keys", {}):
                    continue
            packable = name in weights and all(entry.packable and self._is_packed(entry) for entry in entries)
            try:
                found[name] = self._packed(entries) if packable and not self.dequantize else self._dense(entries)
            except CheckpointError as error:
                raise CheckpointError(f"{self.file.path}: {error}") from error
        return found

    def _is_packed(self, entry: Entry) -> bool:
        return self.file.tensors[entry.ggml].type.dtype is None

    def _packed(self, entries: list[Entry]) -> Packed:
        """Return the blocks of one parameter; parts along the rows stay apart, so that nothing is copied."""
        pieces = [self._blocks(entry) for entry in entries]
        if len(pieces) == 1:
            return Packed(*pieces[0])
        part = entries[0].recipe.part
        layouts, parts = [layout for layout, _ in pieces], [own for _, own in pieces]
        if part is None or part.stacked or part.interleaved:
            # One matrix after the other, or row by row: they become one tensor of blocks, which takes a copy.
            return Packed(*_joined(entries, layouts, parts))
        stacked = Stacked.of(layouts, parts)
        if stacked is None:
            raise CheckpointError(f"{[entry.ggml for entry in entries]} do not fit together")
        return Packed(*stacked)

    def _blocks(self, entry: Entry) -> tuple[Layout, dict[str, Tensor]]:
        info = self.file.tensors[entry.ggml]
        blocks = self.file.tensor(entry.ggml)
        recipe = entry.recipe
        if recipe.rows is not None:
            blocks = blocks.index_select(-2, recipe.rows)
        parts = {"blocks": blocks}
        transforms: tuple[Transform, ...] = ()
        if recipe.columns is not None:
            # Moving columns would tear blocks: the input is permuted instead.
            transforms = (Transform("permute", "in"),)
            parts["in_perm"] = torch.argsort(recipe.columns).to(torch.int32)
        layout = Blocks(
            out_features=info.shape[-2],
            in_features=info.shape[-1],
            record=record_of(info.type.name),
            transforms=transforms,
        )
        return layout, parts

    def _dense(self, entries: list[Entry]) -> Tensor:
        return Entry.assembled(entries, [self.dense(entry.ggml) for entry in entries])

    def dense(self, name: str) -> Tensor:
        """Return the file's tensor ``name`` dense, rows in the file's order: blocks in float32, others as they are."""
        info = self.file.tensors[name]
        tensor = self.file.tensor(name)
        if info.type.dtype is not None:
            return tensor
        record = record_of(info.type.name)
        rows = tensor.reshape(-1, tensor.shape[-1])
        layout = Blocks(out_features=rows.shape[0], in_features=info.shape[-1], record=record)
        layout.check_values({"blocks": rows})
        return layout.decode({"blocks": rows}).reshape(info.shape)

    def config(self) -> dict[str, Any]:
        from qhub_gguf.metadata import config_of

        return config_of(self.file)

    def tokenizer(self) -> tuple[Any, dict[str, Any]]:
        from qhub_gguf.metadata import tokenizer_of

        return tokenizer_of(self.file)


def _joined(
    entries: list[Entry], layouts: list[Layout], parts: list[dict[str, Tensor]]
) -> tuple[Layout, dict[str, Tensor]]:
    part = entries[0].recipe.part
    assert part is not None
    if any(layout != layouts[0] for layout in layouts):
        kinds = sorted({layout.record.name for layout in layouts if isinstance(layout, Blocks)})
        raise CheckpointError(f"{[entry.ggml for entry in entries]} are one parameter and of several types, {kinds}")
    blocks = [own["blocks"] for own in parts]
    if part.stacked:
        return layouts[0], {"blocks": torch.stack(blocks, part.dim)}
    rows = torch.stack(blocks, -2).flatten(-3, -2)
    return layouts[0].with_rows(rows.shape[-2]), {"blocks": rows}
