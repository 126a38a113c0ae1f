"""IQ1, IQ2 and IQ3: four or eight weights at a time are a vector of a table, under a step of three or four bits.

Source of all bytes: the block structs of ggml-common.h and ``dequantize_row_iq*`` of ggml-quants.c (llama.cpp).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from qhub.layouts import Codebook, Layout, Parts
from qhub_gguf.records import grids
from qhub_gguf.records.base import GgmlRecord
from qhub_gguf.records.fields import half, join, put_half, spread
from qhub_gguf.records.lattice_plain import from_plain, to_plain
from qhub_gguf.records.search import Vectors, fit_lattice, nearest_vectors

__all__ = ["LATTICES", "LatticeRecord"]


class LatticeRecord(GgmlRecord):
    """Stores entries of the table ``grid``, ``dim`` weights each; steps are a float16 times (2 level + 1) ``unit``.

    ``signs``: ``"free"``: a bit a weight; ``"even"``: an even number of each eight is negative; None: the table has
    both signs. ``top``: the largest level. ``bits``: of an entry's number.
    """

    grid: str
    dim = 8
    bits: int
    signs: str | None
    unit: float
    top: int
    count, width = 256, 8

    @abstractmethod
    def vectors(self, data: Tensor) -> Vectors:
        """Return entry numbers (..., 256/dim) int32 and sign bytes (..., 32) uint8 of ``data`` (..., size)."""

    @abstractmethod
    def levels(self, data: Tensor) -> Tensor:
        """Return the levels (..., 256/group) uint8 of ``data`` (..., size)."""

    @abstractmethod
    def put(self, data: Tensor, found: Vectors) -> None:
        """Write entry numbers and sign bytes into ``data`` (..., size), levels left as they are."""

    @abstractmethod
    def put_levels(self, data: Tensor, levels: Tensor) -> None:
        """Write ``levels`` (..., 256/group) uint8 into ``data`` (..., size)."""

    def factor(self, data: Tensor) -> Tensor:
        """Return the float16 of ``data`` (..., size) as (..., 1) float32."""
        return half(data, self.halves[0])

    def put_factor(self, data: Tensor, values: Tensor) -> None:
        """Write ``values`` (...) as the float16 of ``data`` (..., size)."""
        put_half(data, self.halves[0], values)

    def steps(self, data: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.factor(data) * ((self.levels(data).float() * 2 + 1) * self.unit), None

    def scales(self, data: Tensor) -> Tensor:
        return self.factor(data)

    def values(self, data: Tensor) -> Tensor:
        return self.worth(self.vectors(data))

    def worth(self, found: Vectors) -> Tensor:
        device = found.entries.device
        rows = grids.packed(self.grid, device).index_select(0, found.entries.flatten())
        values = rows.view(torch.int8).reshape(*found.entries.shape[:-1], -1)
        if found.signs is None:
            return values
        signs = grids.sign_rows(device).index_select(0, found.signs.flatten().int())
        return values * signs.view(torch.int8).reshape(values.shape)

    def find(self, ratio: Tensor) -> Vectors:
        return nearest_vectors(self, ratio)

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Tensor:
        return fit_lattice(self, weights, importance)

    def plain(self, out_features: int, in_features: int, blocks: Tensor) -> tuple[Codebook, dict[str, Tensor]]:
        return to_plain(self, out_features, in_features, blocks)

    def from_plain(self, layout: Layout, parts: Parts) -> Tensor | None:
        return from_plain(self, layout, parts)


def _words(data: Tensor, dtype: torch.dtype) -> Tensor:
    """View bytes (..., n) as little-endian words in a copy."""
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def _bytes(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8)


class _Packed32(LatticeRecord):
    """Four sign numbers of seven bits and a level of four in 32 bits, for 32 weights."""

    signs, group, top = "even", 32, 15

    @abstractmethod
    def words(self, data: Tensor) -> Tensor:
        """View the eight words of ``data`` (..., size), as uint8 (..., 8, 4)."""

    def _sign_bytes(self, data: Tensor) -> Tensor:
        word = _words(self.words(data), torch.int32)
        shifts = torch.arange(0, 28, 7, dtype=torch.int32, device=data.device)
        numbers = word >> shifts & 127
        return grids.even_signs(data.device).index_select(0, numbers.flatten()).reshape(*data.shape[:-1], 32)

    def levels(self, data: Tensor) -> Tensor:
        return self.words(data)[..., 3] >> 4

    def _put_signs(self, data: Tensor, signs: Tensor) -> None:
        numbers = (signs & 127).to(torch.int32).unflatten(-1, (8, 4))
        shifts = torch.arange(0, 28, 7, dtype=torch.int32, device=data.device)
        packed = _bytes((numbers << shifts).sum(-1, dtype=torch.int32).unsqueeze(-1))
        packed[..., 3] |= self.levels(data) << 4
        self.words(data).copy_(packed)

    def put_levels(self, data: Tensor, levels: Tensor) -> None:
        last = self.words(data)[..., 3]
        last.copy_(last & 15 | levels << 4)


class IQ2XXS(_Packed32):
    name, size, grid, bits = "IQ2_XXS", 66, "iq2_xxs", 8
    halves, unit = (0,), 1 / 8

    def words(self, data: Tensor) -> Tensor:
        return data[..., 2:].unflatten(-1, (8, 8))[..., 4:]

    def vectors(self, data: Tensor) -> Vectors:
        entries = data[..., 2:].unflatten(-1, (8, 8))[..., :4].int().flatten(-2)
        return Vectors(entries, self._sign_bytes(data))

    def put(self, data: Tensor, found: Vectors) -> None:
        assert found.signs is not None
        data[..., 2:].unflatten(-1, (8, 8))[..., :4] = found.entries.to(torch.uint8).unflatten(-1, (8, 4))
        self._put_signs(data, found.signs)


class IQ3XXS(_Packed32):
    name, size, grid, bits = "IQ3_XXS", 98, "iq3_xxs", 8
    halves, unit, dim = (0,), 1 / 4, 4

    def words(self, data: Tensor) -> Tensor:
        return data[..., 66:].unflatten(-1, (8, 4))

    def vectors(self, data: Tensor) -> Vectors:
        return Vectors(data[..., 2:66].int(), self._sign_bytes(data))

    def put(self, data: Tensor, found: Vectors) -> None:
        assert found.signs is not None
        data[..., 2:66] = found.entries.to(torch.uint8)
        self._put_signs(data, found.signs)


class IQ2XS(LatticeRecord):
    name, size, grid, bits = "IQ2_XS", 74, "iq2_xs", 9
    halves, unit, signs, group, top = (0,), 1 / 8, "even", 16, 15

    def vectors(self, data: Tensor) -> Vectors:
        words = _words(data[..., 2:66], torch.int16).int()
        numbers = (words >> 9 & 127).flatten()
        return Vectors(words & 511, grids.even_signs(data.device).index_select(0, numbers).reshape(words.shape))

    def put(self, data: Tensor, found: Vectors) -> None:
        assert found.signs is not None
        words = found.entries | (found.signs & 127).int() << 9
        data[..., 2:66] = _bytes(words.to(torch.int16))

    def levels(self, data: Tensor) -> Tensor:
        return spread(data[..., 66:74], 4, 1)

    def put_levels(self, data: Tensor, levels: Tensor) -> None:
        data[..., 66:74] = join(levels, 4, 1)


class IQ2S(LatticeRecord):
    name, size, grid, bits = "IQ2_S", 82, "iq2_s", 10
    halves, unit, signs, group, top = (0,), 1 / 8, "free", 16, 15

    def vectors(self, data: Tensor) -> Vectors:
        return Vectors(data[..., 2:34].int() | spread(data[..., 66:74], 2, 1).int() << 8, data[..., 34:66])

    def put(self, data: Tensor, found: Vectors) -> None:
        assert found.signs is not None
        data[..., 2:34] = (found.entries & 255).to(torch.uint8)
        data[..., 34:66] = found.signs
        data[..., 66:74] = join((found.entries >> 8).to(torch.uint8), 2, 1)

    def levels(self, data: Tensor) -> Tensor:
        return spread(data[..., 74:82], 4, 1)

    def put_levels(self, data: Tensor, levels: Tensor) -> None:
        data[..., 74:82] = join(levels, 4, 1)


class IQ3S(LatticeRecord):
    name, size, grid, bits = "IQ3_S", 110, "iq3_s", 9
    halves, unit, signs, group, top, dim = (0,), 1.0, "free", 32, 15, 4

    def vectors(self, data: Tensor) -> Vectors:
        return Vectors(data[..., 2:66].int() | spread(data[..., 66:74], 1, 1).int() << 8, data[..., 74:106])

    def put(self, data: Tensor, found: Vectors) -> None:
        assert found.signs is not None
        data[..., 2:66] = (found.entries & 255).to(torch.uint8)
        data[..., 66:74] = join((found.entries >> 8).to(torch.uint8), 1, 1)
        data[..., 74:106] = found.signs

    def levels(self, data: Tensor) -> Tensor:
        return spread(data[..., 106:110], 4, 1)

    def put_levels(self, data: Tensor, levels: Tensor) -> None:
        data[..., 106:110] = join(levels, 4, 1)


class IQ1S(LatticeRecord):
    """All vectors of 32 weights are moved the same way: bit 15 of the word with their upper bits and their level."""

    name, size, grid, bits = "IQ1_S", 50, "iq1", 12
    halves, unit, signs, group, top, width = (0,), 1 / 8, None, 32, 7, 32

    def vectors(self, data: Tensor) -> Vectors:
        words = _words(data[..., 34:50], torch.int16).int().unsqueeze(-1)
        shifts = torch.arange(0, 12, 3, dtype=torch.int32, device=data.device)
        upper = ((words >> shifts & 7) << 8 | (words >> 15 & 1) << 11).flatten(-2)
        return Vectors(data[..., 2:34].int() | upper, None)

    def put(self, data: Tensor, found: Vectors) -> None:
        entries = found.entries.unflatten(-1, (8, 4))
        shifts = torch.arange(0, 12, 3, dtype=torch.int32, device=data.device)
        upper = ((entries >> 8 & 7) << shifts).sum(-1, dtype=torch.int32)
        words = upper | self.levels(data).int() << 12 | (entries[..., 0] >> 11) << 15
        data[..., 2:34] = (found.entries & 255).to(torch.uint8)
        data[..., 34:50] = _bytes(words.to(torch.int16))

    def levels(self, data: Tensor) -> Tensor:
        return data[..., 35:50:2] >> 4 & 7

    def put_levels(self, data: Tensor, levels: Tensor) -> None:
        last = data[..., 35:50:2]
        last.copy_(last & 143 | levels << 4)


class IQ1M(LatticeRecord):
    """The float16 lies in the upper four bits of four words, whose other twelve are the levels of 16 weights each."""

    name, size, grid, bits = "IQ1_M", 56, "iq1", 12
    unit, signs, group, top = 1 / 8, None, 16, 7

    def vectors(self, data: Tensor) -> Vectors:
        upper = spread(data[..., 32:48], 4, 1).int()
        # Bit 3 says which way the vector is moved: right behind the upper three bits of its number.
        return Vectors(data[..., :32].int() | upper << 8, None)

    def put(self, data: Tensor, found: Vectors) -> None:
        data[..., :32] = (found.entries & 255).to(torch.uint8)
        data[..., 32:48] = join((found.entries >> 8).to(torch.uint8), 4, 1)

    def levels(self, data: Tensor) -> Tensor:
        words = _words(data[..., 48:56], torch.int16).int().unsqueeze(-1)
        shifts = torch.arange(0, 12, 3, dtype=torch.int32, device=data.device)
        return (words >> shifts & 7).flatten(-2).to(torch.uint8)

    def put_levels(self, data: Tensor, levels: Tensor) -> None:
        shifts = torch.arange(0, 12, 3, dtype=torch.int32, device=data.device)
        words = (levels.int().unflatten(-1, (4, 4)) << shifts).sum(-1, dtype=torch.int32).unsqueeze(-1)
        packed = _bytes(words.to(torch.int16)).flatten(-2)
        packed[..., 1::2] |= data[..., 49:56:2] & 240
        data[..., 48:56] = packed

    def factor(self, data: Tensor) -> Tensor:
        nibbles = data[..., 49:56:2] >> 4
        pairs = nibbles[..., ::2] | nibbles[..., 1::2] << 4
        return pairs.contiguous().view(torch.float16).float()

    def put_factor(self, data: Tensor, values: Tensor) -> None:
        stored = torch.zeros(*data.shape[:-1], 2, dtype=torch.uint8, device=data.device)
        put_half(stored, 0, values)
        nibbles = spread(stored, 4, 1)
        last = data[..., 49:56:2]
        last.copy_(last & 15 | nibbles << 4)


LATTICES = (IQ2XXS(), IQ2XS(), IQ2S(), IQ3XXS(), IQ3S(), IQ1S(), IQ1M())
