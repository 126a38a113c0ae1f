"""Ways to break a checkpoint: each takes a copy of a good one and changes one thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qhub.formats import Entry, Format
from qhub.integrations.transformers.checkpoint import read_headers, sort_entries
from qhub.layouts import Layout
from qhub.testing.conformance.workbench import quantized_weights

__all__ = ["Checkpoint", "Victim", "another_dtype", "other_shapes", "with_first"]

_NAME = "model.safetensors"


@dataclass(frozen=True)
class Victim:
    """Is the stored weight that gets damaged: ``entries`` by local name, and what the format declares for them."""

    prefix: str
    layout: Layout
    entries: dict[str, Tensor]
    declared: dict[str, Entry]

    def key(self, local: str) -> str:
        """Return the tensor's name in the file."""
        return f"{self.prefix}.{local}"

    def required(self, local: str) -> bool:
        """Return whether a file must hold the entry."""
        return self.declared[local].required


class Checkpoint:
    """Is a good checkpoint folder with one weights file, from which damaged copies are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def victim(self, model: Any, fmt: Format) -> Victim:
        """Return the first quantized layer of ``model`` that the file stores under the layer's own name."""
        stored, _ = sort_entries(read_headers([str(self.folder / _NAME)]), fmt)
        tensors = load_file(self.folder / _NAME)
        weights = quantized_weights(model)
        prefix = next(prefix for prefix in sorted(stored) if f"{prefix}.weight" in weights)
        layout = weights[f"{prefix}.weight"].quant_layout
        entries = {name: tensors[found.key] for name, found in stored[prefix].entries.items()}
        return Victim(prefix, layout, entries, dict(fmt.entries(layout)))

    def dense_key(self, fmt: Format) -> str:
        """Return the name of a tensor that is not quantized and that every layer has: a norm's weight."""
        _, dense = sort_entries(read_headers([str(self.folder / _NAME)]), fmt)
        return next(key for key in sorted(dense) if "norm" in key)

    def copy(self, target: Path) -> Path:
        """Copy the checkpoint to ``target`` and return that."""
        return Path(shutil.copytree(self.folder, target, dirs_exist_ok=True))

    def with_tensors(self, target: Path, changes: Mapping[str, Tensor | None]) -> Path:
        """Return a copy with the tensors ``changes`` put in or replaced; None takes one out."""
        folder = self.copy(target)
        tensors: dict[str, Tensor | None] = {**load_file(folder / _NAME), **changes}
        # safetensors wants each tensor whole and alone in its memory.
        whole = {name: value.contiguous().clone() for name, value in tensors.items() if value is not None}
        save_file(whole, folder / _NAME, metadata={"format": "pt"})
        return folder

    def with_bytes(self, target: Path, change: Callable[[bytes], bytes]) -> tuple[Path, Path]:
        """Return a copy whose weights file ``change`` has edited, and that file."""
        folder = self.copy(target)
        file = folder / _NAME
        file.write_bytes(change(file.read_bytes()))
        return folder, file

    def with_config(self, target: Path, **changes: Any) -> Path:
        """Return a copy with ``changes`` to the quantization_config in its config.json."""
        folder = self.copy(target)
        file = folder / "config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        values["quantization_config"] |= changes
        file.write_text(json.dumps(values), encoding="utf-8")
        return folder

    def with_pickle(self, target: Path) -> tuple[Path, Path]:
        """Return a copy whose weights are a pickle file, and that file."""
        folder = self.copy(target)
        file = folder / "pytorch_model.bin"
        torch.save(load_file(folder / _NAME), file)
        (folder / _NAME).unlink()
        return folder, file


def other_shapes(value: Tensor) -> list[Tensor]:
    """Return ``value`` in shapes that do not fit: a row more, and, where that changes anything, transposed."""
    if value.ndim == 0:
        return [torch.stack([value, value])]
    longer = _bytewise(value, lambda raw: torch.cat([raw, raw[:1]]))
    if value.ndim == 2 and value.shape[0] != value.shape[1] and 1 not in value.shape:
        return [longer, value.t()]
    return [longer]


def another_dtype(value: Tensor, allowed: tuple[torch.dtype, ...]) -> Tensor | None:
    """Return ``value`` in a dtype that is not ``allowed``; None when all are."""
    wide = (torch.float64,) if value.is_floating_point() else (torch.int64, torch.int16, torch.float64)
    chosen = next((dtype for dtype in wide if dtype not in allowed), None) if allowed else None
    return None if chosen is None else value.to(chosen)


def with_first(value: Tensor, number: float) -> Tensor | None:
    """Return a float ``value`` that begins with ``number`` (NaN, infinity); None if its dtype has no such number."""
    special = torch.tensor(number).to(value.dtype)
    if special.float().isnan().item() != torch.tensor(number).isnan().item():
        return None
    changed = value.clone()
    # Bytes are moved, not numbers: where floats are a disguise for packed codes, their neighbours must not change.
    width = value.element_size()
    changed.reshape(-1).view(torch.uint8)[:width] = special.reshape(1).view(torch.uint8)
    return changed


def _bytewise(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``change``, along the first dimension, to ``value``; through bytes, as few operators take float8."""
    if value.element_size() != 1 or value.dtype == torch.bool:
        return change(value)
    return change(value.view(torch.uint8)).view(value.dtype)
