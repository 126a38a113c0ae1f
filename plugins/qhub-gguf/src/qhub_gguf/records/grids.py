"""The tables of vectors behind IQ1, IQ2 and IQ3.

Source: ``iq1s_grid`` ... ``iq3s_grid`` and ``ksigns_iq2xs`` of ggml-common.h (llama.cpp); ``grids.bin`` holds them with
2 or 4 bits a number, written by tests/records/make_grids.py.
"""

from __future__ import annotations

import functools
from importlib import resources

import torch
from torch import Tensor

from qhub_gguf.records.fields import spread

__all__ = ["cells", "entries", "even_signs", "neighbours", "packed", "sign_rows", "vectors"]

# Where a table begins in the file, its entries, numbers in an entry, what a code stands for.
_TABLES = {
    "iq2_xxs": (0, 256, 8, (8, 25, 43)),
    "iq2_xs": (512, 512, 8, (8, 25, 43)),
    "iq2_s": (1536, 1024, 8, (8, 25, 43)),
    "iq3_xxs": (3584, 256, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    "iq3_s": (4096, 512, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
    "iq1": (5120, 2048, 8, (-1, 0, 1)),
}
# IQ1 moves each vector by an eighth up or down: in eighths, entries 2048 and up are those moved down.
_EIGHTHS = 8
# How many entries are known to lie near each point of the coarse grid that an argument is rounded to.
_NEAR = 16


@functools.lru_cache(maxsize=32)
def vectors(name: str, device: torch.device) -> Tensor:
    """Return the table ``name`` as (entries, numbers) int8."""
    start, entries, width, meaning = _TABLES[name]
    bits = 2 if len(meaning) <= 4 else 4
    file = resources.files("qhub_gguf.records").joinpath("grids.bin").read_bytes()
    data = torch.frombuffer(bytearray(file), dtype=torch.uint8)[start : start + entries * width * bits // 8]
    codes = spread(data, bits, 1)
    table = torch.tensor(meaning, dtype=torch.int8)[codes.int()].reshape(entries, width)
    if name == "iq1":
        table = torch.cat([table * _EIGHTHS + 1, table * _EIGHTHS - 1])
    return table.to(device)


@functools.lru_cache(maxsize=32)
def packed(name: str, device: torch.device) -> Tensor:
    """Return the table ``name`` with each entry as one int64 or int32, so that an entry is fetched at once."""
    table = vectors(name, device)
    return table.view(torch.int64 if table.shape[1] == 8 else torch.int32).flatten()


@functools.lru_cache(maxsize=8)
def sign_rows(device: torch.device) -> Tensor:
    """Return for each byte eight int8 as one int64: -1 where its bit is set, else 1; the lowest bit first."""
    bits = spread(torch.arange(256, dtype=torch.uint8)[:, None], 1, 1)
    return (1 - 2 * bits.to(torch.int8)).contiguous().view(torch.int64).flatten().to(device)


@functools.lru_cache(maxsize=8)
def even_signs(device: torch.device) -> Tensor:
    """Return the (128,) bytes uint8 with seven given bits and an eighth that makes the number of set bits even."""
    seven = torch.arange(128, dtype=torch.uint8)
    odd = spread(seven[:, None], 1, 1).sum(-1) % 2
    return (seven | odd.to(torch.uint8) << 7).to(device)


def entries(name: str) -> int:
    """Return how many entries the table ``name`` has."""
    return _TABLES[name][1] * (2 if name == "iq1" else 1)


def _meaning(name: str) -> tuple[int, ...]:
    """Return the numbers that the table's entries are made of, moves left out."""
    meaning = _TABLES[name][3]
    return tuple(_EIGHTHS * value for value in meaning) if name == "iq1" else meaning


def cells(name: str, x: Tensor) -> Tensor:
    """Return for vectors ``x`` (..., dim) float32 the number (...) int32 of the cell that they lie in.

    A cell is what rounds to the same number in each place.
    """
    meaning = torch.tensor(_meaning(name), dtype=torch.float32, device=x.device)
    digits = torch.bucketize(x.contiguous(), (meaning[1:] + meaning[:-1]) / 2, out_int32=True)
    powers = torch.tensor([len(meaning) ** i for i in range(x.shape[-1])], dtype=torch.float32, device=x.device)
    return (digits.float() @ powers).to(torch.int32)


@functools.lru_cache(maxsize=32)
def neighbours(name: str, half: int | None, device: torch.device) -> Tensor:
    """Return for each cell the (cells, 16) int32 numbers of the entries nearest to its middle.

    ``half``: of the first or the second half of the table alone, counted from its start.
    """
    table = vectors(name, torch.device("cpu")).float()
    if half is not None:
        table = table.chunk(2)[half]
    meaning = torch.tensor(_meaning(name), dtype=torch.float32)
    middles = torch.cartesian_prod(*[meaning] * table.shape[1]).flip(-1)
    # The first number changes fastest: cell = sum of digit * base^place.
    distances = table.square().sum(-1) - 2 * middles @ table.t()
    return distances.topk(_NEAR, largest=False).indices.to(torch.int32).to(device)
