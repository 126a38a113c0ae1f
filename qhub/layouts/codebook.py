"""``w = scale * sum_c codebook_c[code_c]``: vectors picked by wide codes. AQLM, QuIP#'s E8P, IQ2/IQ3 grids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import rows
from qhub.layouts.base import Layout, Parts, PartSpec
from qhub.layouts.columns import BlockColumns
from qhub.layouts.grid import Grid
from qhub.layouts.nested import FLOATS, Nested, scale_codes, scale_specs, scale_values
from qhub.layouts.packing import pack, packed_length, unpack
from qhub.layouts.vectors import Book, FoldedBook, PlainBook

__all__ = ["Codebook"]

# How often every codebook is searched again: on Gaussian weights under random codebooks (2x8, 3x6 and 4x8 bits) a
# third sweep takes under 0.1 % off the squared error..
_SWEEPS = 2


@dataclass(frozen=True, kw_only=True)
class Codebook(Layout):
    """Stores blocks of ``out_group`` x ``in_group`` weights as sums of vectors, one from each codebook.

    Parts: ``codes`` (N/out_group, K/in_group, C), int8 where all ``nbits`` are at most 8, int16 where none is: the
    two's complement of the unsigned code; where some are, int8 with one or two bytes a code, the low one first.
    ``codebooks`` (C, rows, out_group, in_group) float, rows being 2**nbits of the largest; ``scales`` of
    ``grid.scale_shape``; with ``signs``, ``signs`` (N, packed_length(K, 1)) uint8, a set bit negates that weight.

    ``nbits``: of each codebook's code; a shorter codebook is padded with rows that no code reaches. ``shared``: True
    where all matrices of a batch use the same codebooks (a lattice), False where each has its own. ``folded``: for each
    codebook, the shift of a :class:`qhub.layouts.vectors.FoldedBook`, whose codes' low ``in_group`` bits are signs and
    which has 2**(nbits - in_group) rows; None for one that lists every vector. ``divisors``: what each codebook's
    vectors are divided by (a residual's scale). Empty: none is folded, none divided.
    """

    kind: ClassVar[str] = "codebook"

    nbits: tuple[int, ...]
    out_group: int
    in_group: int
    grid: Grid
    shared: bool = False
    signs: bool = False
    folded: tuple[float | None, ...] = ()
    divisors: tuple[float, ...] = ()
    scales_nested: Nested | None = None

    def __post_init__(self) -> None:
        if not self.nbits or not all(1 <= bits <= 16 for bits in self.nbits):
            raise LayoutError(f"codes of a codebook layout have 1 to 16 bits, asked for {self.nbits}")
        if self.out_features % self.out_group or self.in_features % self.in_group:
            raise LayoutError(
                f"blocks of {self.out_group}x{self.in_group} weights do not divide "
                f"a {self.out_features}x{self.in_features} matrix"
            )
        for name in ("folded", "divisors"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.nbits):
                raise LayoutError(f"{name}={getattr(self, name)} of a layout with {len(self.nbits)} codebooks")
        if any(shift is not None for shift in self.folded) and (self.out_group != 1 or min(self.nbits) < self.in_group):
            raise LayoutError(
                f"codes of {self.nbits} bits cannot carry the signs of blocks of {self.out_group}x{self.in_group}"
            )
        if not all(math.isfinite(divisor) and divisor > 0 for divisor in self.divisors):
            raise LayoutError(f"codebooks are divided by numbers above zero, asked for {self.divisors}")

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Return the shape of the scales of one matrix."""
        return self.grid.scale_shape(self.out_features, self.in_features)

    @property
    def code_dtype(self) -> torch.dtype:
        """Return the dtype of the codes."""
        return torch.int8 if min(self.nbits) <= 8 else torch.int16

    @property
    def _bytes(self) -> tuple[int, ...] | None:
        """Return how many bytes each code takes where that differs; None where all have one integer each."""
        sizes = tuple(1 if bits <= 8 else 2 for bits in self.nbits)
        return sizes if len(set(sizes)) > 1 else None

    @property
    def _rows(self) -> tuple[int, ...]:
        """Return how many rows of its table each codebook uses."""
        folded = self.folded or (None,) * len(self.nbits)
        return tuple(
            2 ** (bits if shift is None else bits - self.in_group)
            for bits, shift in zip(self.nbits, folded, strict=True)
        )

    def scale_tensors(self) -> dict[str, Nested | None]:
        return {"scales": self.scales_nested}

    def core_specs(self) -> dict[str, PartSpec]:
        blocks = (self.out_features // self.out_group, self.in_features // self.in_group)
        books = (len(self.nbits), max(self._rows), self.out_group, self.in_group)
        specs = {
            "codes": PartSpec((*blocks, sum(self._bytes or (1,) * len(self.nbits))), (self.code_dtype,)),
            "codebooks": PartSpec(books, FLOATS, batched=not self.shared),
            **scale_specs("scales", self.scale_shape, self.scales_nested),
        }
        if self.signs:
            specs["signs"] = PartSpec((self.out_features, packed_length(self.in_features, 1)), (torch.uint8,))
        return specs

    def indices(self, parts: Parts) -> Tensor:
        """Return the unsigned codes (..., N/out_group, K/in_group, C) int64."""
        codes = parts["codes"].to(torch.int64)
        if self._bytes is not None:
            unsigned = (codes & 255).split(self._bytes, dim=-1)
            codes = torch.stack([one[..., 0] if one.shape[-1] == 1 else _word(one) for one in unsigned], dim=-1)
        return codes & torch.tensor([2**bits - 1 for bits in self.nbits], device=codes.device)

    def stored_codes(self, codes: Tensor) -> Tensor:
        """Return the part ``codes`` for unsigned ``codes`` (..., C) int64."""
        if self._bytes is not None:
            pieces = [codes[..., index] >> 8 * byte for index, size in enumerate(self._bytes) for byte in range(size)]
            codes = torch.stack(pieces, dim=-1)
        return codes.to(self.code_dtype)

    def check_values(self, parts: Parts) -> None:
        super().check_values(parts)
        codes = parts["codes"]
        if codes.device.type == "meta":
            return
        if self._bytes is not None:
            outside = [
                _word(one) >= 2**bits if size > 1 else (one[..., 0] >= 2**bits)
                for one, size, bits in zip(
                    (codes.to(torch.int64) & 255).split(self._bytes, dim=-1), self._bytes, self.nbits, strict=True
                )
            ]
            if any(bool(one.any()) for one in outside):
                raise LayoutError(f"tensor 'codes' holds a code outside codebooks of {self.nbits} bits")
            return
        width = 8 if self.code_dtype == torch.int8 else 16
        unsigned = codes.to(torch.int64) & (2**width - 1)
        for index, bits in enumerate(self.nbits):
            # Both readings of an int8/int16 are in use: unsigned below 2**bits, or two's complement of `bits` bits.
            one, signed = unsigned[..., index], codes[..., index]
            ok = (one < 2**bits) | ((signed >= -(2 ** (bits - 1))) & (signed < 2 ** (bits - 1)))
            if not bool(ok.all()):
                worst = int(signed[~ok].flatten()[0])
                raise LayoutError(f"tensor 'codes' holds {worst}, outside the {2**bits} entries of codebook {index}")

    def _books(self, codebooks: Tensor) -> list[Book]:
        """Return the books of one matrix, ``codebooks`` (C, rows, out_group, in_group), vectors flattened."""
        tables = codebooks.float().flatten(-2)
        folded, divisors = self.folded or (None,) * len(self.nbits), self.divisors or (1.0,) * len(self.nbits)
        books: list[Book] = []
        for table, rows_used, shift, divisor in zip(tables, self._rows, folded, divisors, strict=True):
            used = table[:rows_used] if divisor == 1.0 else table[:rows_used] / divisor
            books.append(PlainBook(used) if shift is None else FoldedBook(used, shift / divisor))
        return books

    def _lookup(self, parts: Parts, indices: Tensor) -> Tensor:
        """Return sum_c codebook_c[code_c] as (..., N, K) float32."""
        books = parts["codebooks"]
        if self.shared or books.ndim == 4:
            vectors = _sum_of(self._books(books), indices)
        else:
            batch = indices.shape[:-3]
            flat = books.flatten(0, len(batch) - 1), indices.flatten(0, len(batch) - 1)
            each = [_sum_of(self._books(one), codes) for one, codes in zip(*flat, strict=True)]
            vectors = torch.stack(each).unflatten(0, batch)
        vectors = vectors.unflatten(-1, (self.out_group, self.in_group))
        return vectors.transpose(-3, -2).reshape(*indices.shape[:-3], self.out_features, self.in_features)

    def _signs(self, parts: Parts) -> Tensor:
        return 1.0 - 2.0 * unpack(parts["signs"], 1, self.in_features).float()

    def decode(self, parts: Parts) -> Tensor:
        weight = self._lookup(parts, self.indices(parts))
        if self.signs:
            weight = weight * self._signs(parts)
        scales = scale_values("scales", self.scale_shape, self.scales_nested, parts).float()
        weight = self.grid.split(weight) * self.grid.spread(scales)
        return self.grid.join(weight, self.out_features, self.in_features)

    def fit(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        # Codebooks are the method's; what can be refitted here is the scale: first as the weights have grown, so that
        # they lie among the vectors as before, then by least squares on the vectors that are chosen there.
        dims = self.grid.member_dims
        w = self.grid.split(weight.float())
        before, after = (one.square().sum(dims).sqrt() for one in (self.grid.split(self.decode(parts)), w))
        growth = torch.where(before > 0, after / before, torch.ones_like(after))
        grown = scale_values("scales", self.scale_shape, self.scales_nested, parts).float() * growth
        kept = {**parts, **scale_codes("scales", grown, self.scales_nested, parts)}
        kept |= self.nearest(weight, kept)
        shape = self._lookup(kept, self.indices(kept)) * (self._signs(kept) if self.signs else 1.0)
        v = self.grid.split(shape)
        scale = (w * v).sum(dims) / v.square().sum(dims).clamp_min(1e-12)
        fitted = scale_codes("scales", scale, self.scales_nested, parts)
        return fitted | self.nearest(weight, {**kept, **fitted})

    def nearest(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Return ``codes`` (and ``signs``) near to ``weight``: the nearest for one codebook.

        For several, from two starts (each codebook in turn on what is left; the codes of ``parts``), one codebook at a
        time is searched again with the others held fixed; the nearer result is taken per block. So codes change only
        where that brings a block nearer. It is the coordinate-wise part of AQLM's search (Egiazarian et al. 2024,
        section 3.2, phase 1), without its beam.
        """
        scales = scale_values("scales", self.scale_shape, self.scales_nested, parts).float()
        scale = self.grid.spread(scales)
        scaled = self.grid.split(weight.float()) / torch.where(scale == 0, torch.ones_like(scale), scale)
        target = self.grid.join(scaled, self.out_features, self.in_features)
        result: dict[str, Tensor] = {}
        if self.signs:
            result["signs"] = pack((target < 0).to(torch.uint8), 1)
            target = target.abs()
        batch = target.shape[:-2]
        blocks = target.reshape(
            *batch,
            self.out_features // self.out_group,
            self.out_group,
            self.in_features // self.in_group,
            self.in_group,
        )
        blocks = blocks.transpose(-3, -2).flatten(-2)
        books, old = parts["codebooks"], self.indices(parts)
        if batch and not self.shared:
            flat = (blocks.flatten(0, len(batch) - 1), books.flatten(0, len(batch) - 1), old.flatten(0, len(batch) - 1))
            codes = torch.stack([self._search(*one) for one in zip(*flat, strict=True)]).reshape(old.shape)
        else:
            codes = self._search(blocks, books, old)
        result["codes"] = self.stored_codes(codes)
        return result

    def columns(self, parts: Parts) -> BlockColumns:
        scales = scale_values("scales", self.scale_shape, self.scales_nested, parts).float()
        scale = self.grid.expand(scales, self.out_features, self.in_features)
        slice_of = dataclasses.replace(self, in_features=self.in_group, grid=Grid.along_k(1), scales_nested=None)

        def search(column: int, values: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            block = column // self.in_group
            own = {
                "codes": parts["codes"][:, block : block + 1],
                "codebooks": parts["codebooks"],
                "scales": scale[:, column : column + self.in_group],
            }
            found = slice_of.nearest(values, own)
            if self.signs:
                bits = unpack(found.pop("signs"), 1, self.in_group)
                return {**found, "signs": bits}, slice_of.decode({**own, **found, "signs": pack(bits, 1)})
            return found, slice_of.decode({**own, **found})

        return BlockColumns(self.in_group, search)

    def parts_of_columns(self, columns: Any, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        blocks = [columns.found[column] for column in sorted(columns.found)]
        written = {"codes": torch.cat([block["codes"] for block in blocks], dim=-2)}
        if self.signs:
            written["signs"] = pack(torch.cat([block["signs"] for block in blocks], dim=-1), 1)
        return written

    def _search(self, blocks: Tensor, books: Tensor, old: Tensor) -> Tensor:
        """Return codes (..., C) int64 for ``blocks`` (..., out_group * in_group), ``old`` being those they have now;
        ``books``: the part ``codebooks`` of one matrix."""
        target = blocks.reshape(-1, blocks.shape[-1])
        used = self._books(books)
        left, found = target, []
        for book in used:
            found.append(book.nearest(left))
            left = left - book.vectors(found[-1])
        codes = torch.stack(found, dim=-1)
        if len(used) > 1:
            starts = (old.reshape(codes.shape), codes)
            (kept, kept_error), (greedy, greedy_error) = (_descend(target, used, start) for start in starts)
            codes = torch.where((greedy_error < kept_error).unsqueeze(-1), greedy, kept)
        return codes.reshape(old.shape)

    # -- rows --------------------------------------------------------------------------------------------------------

    def row_parts(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor] | None:
        if start % self.out_group or stop % self.out_group:
            return None
        scales = rows.cut_scales(self, self.grid, self.scale_tensors(), parts, start, stop)
        if scales is None:
            return None
        codes = parts["codes"][..., start // self.out_group : stop // self.out_group, :, :]
        result = {"codes": codes, "codebooks": parts["codebooks"], **scales}
        return {**result, "signs": parts["signs"][..., start:stop, :]} if self.signs else result

    def stacked_rows(self, parts: Sequence[Parts], layouts: Sequence[Layout]) -> dict[str, Tensor] | None:
        scales = rows.stack_scales(self, self.grid, self.scale_tensors(), parts, layouts)
        if scales is None or not rows.identical([p["codebooks"] for p in parts]):
            return None
        result = {"codes": torch.cat([p["codes"] for p in parts], dim=-3), "codebooks": parts[0]["codebooks"], **scales}
        return {**result, "signs": torch.cat([p["signs"] for p in parts], dim=-2)} if self.signs else result


def _word(two: Tensor) -> Tensor:
    """Return the 16-bit number whose low and high bytes are ``two`` (..., 2) int64."""
    return two[..., 0] | two[..., 1] << 8


def _sum_of(books: list[Book], codes: Tensor) -> Tensor:
    """Return the sum (..., width) of one vector from each of ``books``; ``codes``: (..., C) int64."""
    total = books[0].vectors(codes[..., 0])
    for index, book in enumerate(books[1:], 1):
        total = total + book.vectors(codes[..., index])
    return total


def _descend(target: Tensor, books: list[Book], codes: Tensor) -> tuple[Tensor, Tensor]:
    """Improve ``codes`` (count, C) one codebook at a time; return them and their squared errors (count,)."""
    codes = codes.clone()
    left = target - _sum_of(books, codes)
    error = left.square().sum(-1)
    for _ in range(_SWEEPS):
        for index, book in enumerate(books):
            without = left + book.vectors(codes[:, index])
            found = book.nearest(without)
            # The search compares rounded distances; only a real gain may change a code.
            gained = (without - book.vectors(found)).square().sum(-1) < error
            codes[:, index] = torch.where(gained, found, codes[:, index])
            left = without - book.vectors(codes[:, index])
            error = left.square().sum(-1)
    return codes, error
