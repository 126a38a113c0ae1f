"""Tells what records on grids hold as a codebook of the core's, and the other way."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qhub.layouts import Activation, Codebook, Grid, Layout, Nested, Parts
from qhub_gguf.records import grids
from qhub_gguf.records.search import Vectors

if TYPE_CHECKING:
    from qhub_gguf.records.lattice import LatticeRecord

__all__ = ["from_plain", "to_plain"]


def plain_layout(record: LatticeRecord, n: int, k: int) -> Codebook:
    """Return the codebook that holds what rows of ``record`` hold."""
    return Codebook(
        out_features=n,
        in_features=k,
        nbits=(record.bits,),
        out_group=1,
        in_group=record.dim,
        grid=Grid.along_k(record.group),
        shared=True,
        signs=record.signs is not None,
        scales_nested=Nested("uint8", group=record.count // record.group, bits=5),
    )


def to_plain(record: LatticeRecord, n: int, k: int, blocks: Tensor) -> tuple[Codebook, dict[str, Tensor]]:
    """Return layout and parts with the weights of ``blocks`` (..., N, K/count*size)."""
    data = blocks.unflatten(-1, (k // record.count, record.size))
    layout = plain_layout(record, n, k)
    found = record.vectors(data)
    parts = {
        "codes": _signed(found.entries.flatten(-2).unsqueeze(-1), layout.code_dtype),
        "codebooks": _books(record, blocks.device),
        "scales": (record.levels(data) * 2 + 1).flatten(-2),
        "scales_super": (record.factor(data) * record.unit).flatten(-3),
    }
    if found.signs is not None:
        parts["signs"] = found.signs.flatten(-2)
    return layout, parts


def from_plain(record: LatticeRecord, layout: Layout, parts: Parts) -> Tensor | None:
    """Return blocks (..., N, K/count*size) whose weights are exactly the stored matrix of ``layout``, or None."""
    n, k = layout.out_features, layout.in_features
    if k % record.count or not isinstance(layout, Codebook):
        return None
    plain = dataclasses.replace(layout, transforms=(), activation=Activation())
    books = _books(record, parts["codebooks"].device)
    if plain != plain_layout(record, n, k) or not torch.equal(parts["codebooks"].float(), books):
        return None
    shape = (*parts["codes"].shape[:-2], k // record.count)
    data = torch.zeros(*shape, record.size, dtype=torch.uint8, device=parts["codes"].device)
    record.put_factor(data, parts["scales_super"].float().reshape(shape) / record.unit)
    record.put_levels(data, (parts["scales"] >> 1).clamp_max(record.top).reshape(*shape, -1))
    entries = layout.indices(parts).int().reshape(*shape, -1)
    record.put(data, Vectors(entries, parts["signs"].reshape(*shape, -1) if "signs" in parts else None))
    # Odd signs, even scales and moves that differ within a run are nothing that the bytes can say.
    return data.flatten(-2) if torch.equal(record.decode(data).flatten(-2), layout.decode(parts)) else None


def _books(record: LatticeRecord, device: torch.device) -> Tensor:
    return grids.vectors(record.grid, device).float().reshape(1, -1, 1, record.dim)


def _signed(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Return unsigned numbers as the two's complement that codes are stored in."""
    return entries.to(torch.uint8).view(torch.int8) if dtype == torch.int8 else entries.to(dtype)
