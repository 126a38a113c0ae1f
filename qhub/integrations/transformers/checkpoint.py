"""Reads and sorts the headers of checkpoint files, so that a bad file is refused before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from qhub.errors import CheckpointError
from qhub.formats import Entry, Format

__all__ = ["FileTensor", "StoredWeight", "check_entries", "read_headers", "read_metadata", "sort_entries"]

# The names of safetensors' dtypes (safetensors/src/tensor.rs).
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class FileTensor:
    """Is one tensor in a file, by its header. ``dtype``: None for a type that torch does not have."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass
class StoredWeight:
    """Is a quantized matrix in a checkpoint: ``prefix`` and its entries by local name.

    ``stacked``: it is those of all experts of a fused parameter, leading in every entry.
    """

    prefix: str
    entries: dict[str, FileTensor]
    stacked: bool = False


def read_headers(files: Iterable[str]) -> dict[str, FileTensor]:
    """Return every tensor of safetensors ``files`` by key.

    Raises :class:`CheckpointError` for a file that is truncated or not safetensors, for pickle files unless
    ``QHUB_ALLOW_PICKLE=1``, and for a key that stands in two files.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, FileTensor] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            if os.environ.get("QHUB_ALLOW_PICKLE") == "1":
                found.update(_pickled_headers(file))
                continue
            raise CheckpointError(
                f"{file} is not a safetensors file: reading it could run code that it contains. Convert it to "
                "safetensors, or set QHUB_ALLOW_PICKLE=1 if you trust its author"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    if key in found:
                        raise CheckpointError(f"the tensor {key!r} stands in {found[key].file} and again in {file}")
                    part = opened.get_slice(key)
                    found[key] = FileTensor(key, file, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size if file.exists() else 0
            raise CheckpointError(
                f"{file} ({size} bytes) cannot be read: {error}. It is truncated or damaged: download or copy it again"
            ) from error
    return found


def read_metadata(files: Iterable[Path]) -> dict[str, str]:
    """Return what the headers of safetensors ``files`` say besides their tensors, all in one."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                found |= opened.metadata() or {}
    return found


def _pickled_headers(file: Path) -> dict[str, FileTensor]:
    # weights_only restricts unpickling to tensors; the meta device keeps their values on the disk.
    tensors = torch.load(file, map_location="meta", weights_only=True)
    return {key: FileTensor(key, file, tuple(t.shape), t.dtype) for key, t in tensors.items()}


def sort_entries(headers: dict[str, FileTensor], fmt: Format) -> tuple[dict[str, StoredWeight], dict[str, FileTensor]]:
    """Return the quantized matrices by prefix, and the tensors that belong to none by key."""
    names = sorted(fmt.names, key=len, reverse=True)
    groups: dict[str, dict[str, FileTensor]] = {}
    homes: dict[str, tuple[str, str]] = {}
    stacked: set[str] = set()
    for key, tensor in headers.items():
        for name in names:
            if key.endswith(f".{name}"):
                prefix = key[: -len(name) - 1]
                groups.setdefault(prefix, {})[name] = tensor
                homes[key] = (prefix, name)
                break
        else:
            ending = next((ending for ending in fmt.stacks if key.endswith(ending)), None)
            owner, _, leaf = key.rpartition(".")
            if ending is not None and leaf.startswith(fmt.stack_lead):
                prefix = f"{owner}.{leaf.removeprefix(fmt.stack_lead).removesuffix(ending)}"
                stacked.add(prefix)
                groups.setdefault(prefix, {})[fmt.stacks[ending]] = tensor
                homes[key] = (prefix, fmt.stacks[ending])
    stored = {p: StoredWeight(p, entries, p in stacked) for p, entries in groups.items() if fmt.markers & set(entries)}
    dense = {key: tensor for key, tensor in headers.items() if key not in homes or homes[key][0] not in stored}
    return stored, dense


def check_entries(weight: StoredWeight, expected: dict[str, Entry], method: str) -> list[str]:
    """Return what is wrong with the entries of ``weight``: missing, surplus, of another shape or dtype; [] when nothing
    is."""
    problems = []
    for name, entry in expected.items():
        tensor = weight.entries.get(name)
        label = f"{weight.prefix}.{name}"
        if tensor is None:
            if entry.required:
                problems.append(f"{label} is missing")
            continue
        if entry.shape is not None and tensor.shape != tuple(entry.shape):
            problems.append(f"{label} has shape {tensor.shape}, expected {tuple(entry.shape)}")
        if entry.dtypes and tensor.dtype not in entry.dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in entry.dtypes)
            problems.append(f"{label} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected {wanted}")
    problems += [
        f"{weight.prefix}.{name} has no place in this {method} config"
        for name in weight.entries
        if name not in expected
    ]
    return problems
