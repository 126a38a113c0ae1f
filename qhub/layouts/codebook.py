"""``w = scale * sum_c codebook_c[code_c]``: vectors picked by wide codes. AQLM, QuIP#'s E8P, IQ2/IQ3 grids."""

from __future__ import annotations

import dataclasses
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

__all__ = ["Codebook"]

# How many distances are held at once while searching the nearest vectors: 4 M float32 = 16 MB, near to a cache's size.
_SEARCH_ELEMENTS = 1 << 22
# How often every codebook is searched again: on Gaussian weights under random codebooks (2x8, 3x6 and 4x8 bits) a
# third sweep takes under 0.1 % off the squared error..
_SWEEPS = 2


@dataclass(frozen=True, kw_only=True)
class Codebook(Layout):
    """Stores blocks of ``out_group`` x ``in_group`` weights as sums of vectors, one from each codebook.

    Parts: ``codes`` (N/out_group, K/in_group, C), int8 where all ``nbits`` are at most 8, else int16: the two's
    complement of the unsigned code; ``codebooks`` (C, 2**max(nbits), out_group, in_group) float; ``scales`` of
    ``grid.scale_shape``; with ``signs``, ``signs`` (N, packed_length(K, 1)) uint8, a set bit negates that weight.

    ``nbits``: of each codebook's code; a shorter codebook is padded with rows that no code reaches. ``shared``: True
    where all matrices of a batch use the same codebooks (a lattice), False where each has its own.
    """

    kind: ClassVar[str] = "codebook"

    nbits: tuple[int, ...]
    out_group: int
    in_group: int
    grid: Grid
    shared: bool = False
    signs: bool = False
    scales_nested: Nested | None = None

    def __post_init__(self) -> None:
        if not self.nbits or not all(1 <= bits <= 16 for bits in self.nbits):
            raise LayoutError(f"codes of a codebook layout have 1 to 16 bits, asked for {self.nbits}")
        if self.out_features % self.out_group or self.in_features % self.in_group:
            raise LayoutError(
                f"blocks of {self.out_group}x{self.in_group} weights do not divide "
                f"a {self.out_features}x{self.in_features} matrix"
            )

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Return the shape of the scales of one matrix."""
        return self.grid.scale_shape(self.out_features, self.in_features)

    @property
    def code_dtype(self) -> torch.dtype:
        """Return the dtype of the codes."""
        return torch.int8 if max(self.nbits) <= 8 else torch.int16

    def scale_tensors(self) -> dict[str, Nested | None]:
        return {"scales": self.scales_nested}

    def core_specs(self) -> dict[str, PartSpec]:
        blocks = (self.out_features // self.out_group, self.in_features // self.in_group)
        books = (len(self.nbits), 2 ** max(self.nbits), self.out_group, self.in_group)
        specs = {
            "codes": PartSpec((*blocks, len(self.nbits)), (self.code_dtype,)),
            "codebooks": PartSpec(books, FLOATS, batched=not self.shared),
            **scale_specs("scales", self.scale_shape, self.scales_nested),
        }
        if self.signs:
            specs["signs"] = PartSpec((self.out_features, packed_length(self.in_features, 1)), (torch.uint8,))
        return specs

    def indices(self, parts: Parts) -> Tensor:
        """Return the unsigned codes (..., N/out_group, K/in_group, C) int64."""
        mask = torch.tensor([2**bits - 1 for bits in self.nbits], device=parts["codes"].device)
        return parts["codes"].to(torch.int64) & mask

    def check_values(self, parts: Parts) -> None:
        super().check_values(parts)
        codes = parts["codes"]
        width = 8 if self.code_dtype == torch.int8 else 16
        if codes.device.type == "meta":
            return
        unsigned = codes.to(torch.int64) & (2**width - 1)
        for index, bits in enumerate(self.nbits):
            # Both readings of an int8/int16 are in use: unsigned below 2**bits, or two's complement of `bits` bits.
            one, signed = unsigned[..., index], codes[..., index]
            ok = (one < 2**bits) | ((signed >= -(2 ** (bits - 1))) & (signed < 2 ** (bits - 1)))
            if not bool(ok.all()):
                worst = int(signed[~ok].flatten()[0])
                raise LayoutError(f"tensor 'codes' holds {worst}, outside the {2**bits} entries of codebook {index}")

    def _lookup(self, parts: Parts, indices: Tensor) -> Tensor:
        """Return sum_c codebook_c[code_c] as (..., N, K) float32."""
        books = parts["codebooks"].float()
        if self.shared or books.ndim == 4:
            vectors = sum(books[c][indices[..., c]] for c in range(len(self.nbits)))
        else:
            batch = indices.shape[:-3]
            flat_books, flat = books.flatten(0, len(batch) - 1), indices.flatten(0, len(batch) - 1)
            vectors = torch.stack(
                [sum(b[c][i[..., c]] for c in range(len(self.nbits))) for b, i in zip(flat_books, flat, strict=True)]  # type: ignore[misc]
            )
            vectors = vectors.reshape(*batch, *vectors.shape[1:])
        assert isinstance(vectors, Tensor)
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
        # Codebooks are the method's; what can be refitted here is the scale, by least squares on the chosen vectors.
        kept = {**parts, **self.nearest(weight, parts)}
        shape = self._lookup(kept, self.indices(kept)) * (self._signs(kept) if self.signs else 1.0)
        dims = self.grid.member_dims
        w, v = self.grid.split(weight.float()), self.grid.split(shape)
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
        books, old = parts["codebooks"].float().flatten(-2), self.indices(parts)
        if batch and not self.shared:
            flat = (blocks.flatten(0, len(batch) - 1), books.flatten(0, len(batch) - 1), old.flatten(0, len(batch) - 1))
            codes = torch.stack([self._search(*one) for one in zip(*flat, strict=True)]).reshape(old.shape)
        else:
            codes = self._search(blocks, books, old)
        result["codes"] = codes.to(self.code_dtype)
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
        """Return codes (..., C) int64 for ``blocks`` (..., out_group * in_group), ``old`` being those they have now."""
        target = blocks.reshape(-1, blocks.shape[-1])
        used = [books[index][: 2**bits] for index, bits in enumerate(self.nbits)]
        left, found = target, []
        for book in used:
            found.append(_nearest_rows(left, book))
            left = left - book[found[-1]]
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


def _nearest_rows(points: Tensor, book: Tensor) -> Tensor:
    """Return the index (count,) of the row of ``book`` nearest to each of ``points`` (count, width)."""
    # |p - v|^2 is least where p.v - |v|^2 / 2 is largest: one product per chunk, with the norm as one more coordinate.
    rows = torch.cat([book, book.square().sum(-1, keepdim=True) / -2], dim=-1).T
    lifted = torch.nn.functional.pad(points, (0, 1), value=1.0)
    step = max(1, _SEARCH_ELEMENTS // book.shape[0])
    return torch.cat([(chunk @ rows).argmax(-1) for chunk in lifted.split(step)])


def _descend(target: Tensor, books: list[Tensor], codes: Tensor) -> tuple[Tensor, Tensor]:
    """Improve ``codes`` (count, C) one codebook at a time; return them and their squared errors (count,)."""
    codes = codes.clone()
    left = target - sum(book[codes[:, index]] for index, book in enumerate(books))
    error = left.square().sum(-1)
    for _ in range(_SWEEPS):
        for index, book in enumerate(books):
            without = left + book[codes[:, index]]
            found = _nearest_rows(without, book)
            # The search compares rounded distances; only a real gain may change a code.
            gained = (without - book[found]).square().sum(-1) < error
            codes[:, index] = torch.where(gained, found, codes[:, index])
            left = without - book[codes[:, index]]
            error = left.square().sum(-1)
    return codes, error
