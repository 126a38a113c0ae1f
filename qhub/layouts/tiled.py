"""The same numbers in the order that a GPU reads them: codes as 16-bit words, in tiles of 64 rows.

Every kernel that multiplies a few rows of input with packed weights wants two things of the order of the codes. What
one program reads should lie together, and the codes of one word should belong to places of the input that lie far
apart: the first codes of 32 words then are 32 consecutive weights, so that a tile of words becomes a tile of weights by
one shift, with no shuffling. This layout is that order and nothing else: :meth:`Tiled.plain` gives the codes back in
the ordinary one, bit for bit, and whatever is not a product is done on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import rows
from qhub.layouts.affine import Affine
from qhub.layouts.base import UNMEASURED, GridPolicy, Layout, Parts, PartSpec
from qhub.layouts.columns import Columns
from qhub.layouts.float8 import Float8
from qhub.layouts.lookup import Lookup
from qhub.layouts.nested import Nested
from qhub.layouts.packing import pack, unpack

__all__ = ["ROWS", "SLICE", "Tiled"]

# Rows of a tile, and weights of one row that a slice of 32 words gives at each shift.
ROWS, SLICE = 64, 32


@dataclass(frozen=True, kw_only=True)
class Tiled(Layout):
    """Holds the matrix ``of`` in tiles.

    With P = 16 // bits codes a word and K' = P * 32 weights of a row in a block: word w of row r in tile t and block b
    holds, in its bits [j * bits, (j + 1) * bits), the code of row 64 t + r and column b K' + 32 j + w. Missing rows and
    columns are zero codes.

    Parts: ``qweight`` (T, B, 64, 32) int16, T = ceil(N / 64), B = ceil(K / K'); ``scales`` and ``zeros`` (T, G, 64) in
    their own dtype, G groups of a row; what else ``of`` has, as it is. Transforms and activations are those of ``of``.
    ``narrow``: ``of`` has float32 scales that are numbers of bfloat16, as the largest magnitudes of bfloat16 weights
    are, and they are held as such; when a weight is fitted anew, its scales are rounded to that.
    The number of row 16 a + 8 h + g of a tile is at place 16 a + 2 g + h: of two rows that one lane holds in a matrix
    operand, the numbers are one read.
    """

    kind: ClassVar[str] = "tiled"
    arranged: ClassVar[bool] = True

    of: Layout
    narrow: bool = dataclasses.field(default=False, metadata={UNMEASURED: True})

    @staticmethod
    def refusal(layout: Layout) -> str | None:
        """Return why ``layout`` cannot be held in tiles; None when it can."""
        if not isinstance(layout, (Affine, Lookup, Float8)):
            return f"codes of a {layout.kind} layout are not numbers of a fixed width"
        grid = layout.grid
        if grid.kind != "block":
            return f"groups are {grid.kind} runs of the matrix, not runs of one row"
        if grid.cols % SLICE and grid.cols < layout.in_features:
            return f"groups of {grid.cols} weights are not made of slices of {SLICE}"
        if grid.rows > 1 and any(layout.scale_tensors().values()):
            return "blocks of several rows under nested scales"
        if layout.activation.kind != "none":
            return f"inputs are rounded to {layout.activation.scheme}"
        return None

    @staticmethod
    def arrange(layout: Layout, parts: Parts) -> tuple[Tiled, dict[str, Tensor]]:
        """Return ``layout`` in tiles, and its ``parts`` (with any batch dimensions) re-ordered.

        Raises :class:`LayoutError` where :meth:`refusal` names a reason.
        """
        reason = Tiled.refusal(layout)
        if reason is not None:
            raise LayoutError(f"a {layout.kind} layout cannot be held in tiles: {reason}")
        tiled = Tiled(
            out_features=layout.out_features,
            in_features=layout.in_features,
            transforms=layout.transforms,
            activation=layout.activation,
            of=layout,
            narrow=layout.scale_tensors()["scales"] is None and _is_short(parts["scales"]),
        )
        return tiled, tiled._arranged(parts)

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Return the width of a code."""
        return getattr(self.of, "bits", 8)

    @property
    def per_word(self) -> int:
        """Return how many codes a word holds."""
        return 16 // self.bits

    @property
    def tiles(self) -> int:
        """Return how many tiles lie on top of each other."""
        return -(-self.out_features // ROWS)

    @property
    def blocks(self) -> int:
        """Return how many blocks of ``per_word * 32`` columns lie side by side."""
        return -(-self.in_features // (self.per_word * SLICE))

    @property
    def groups(self) -> int:
        """Return how many groups a row has."""
        return self._grid_shape[1]

    @property
    def group_size(self) -> int:
        """Return how many weights of a row share a scale; K where all do."""
        return min(self.of.grid.cols, self.in_features)  # type: ignore[attr-defined]

    @property
    def _grid_shape(self) -> tuple[int, int]:
        shape = self.of.scale_shape  # type: ignore[attr-defined]
        return shape[0], shape[1]

    # -- the same numbers in another order ---------------------------------------------------------------------------

    def _tiled_names(self) -> dict[str, tuple[torch.dtype, ...]]:
        """Return the parts of ``of`` that hold a number per group, with their dtypes."""
        specs = self.of.core_specs()
        return {name: specs[name].dtypes for name in self.of.scale_tensors()}

    def core_specs(self) -> dict[str, PartSpec]:
        specs = self.of.core_specs()
        groups = (self.tiles, self.groups, ROWS)
        for name, dtypes in self._tiled_names().items():
            specs[name] = PartSpec(groups, (torch.bfloat16,) if name == "scales" and self.narrow else dtypes)
        specs["qweight"] = PartSpec((self.tiles, self.blocks, ROWS, SLICE), (torch.int16,))
        return specs

    def _arranged(self, parts: Parts) -> dict[str, Tensor]:
        bits, per_word = self.bits, self.per_word
        raw = parts["qweight"]
        if isinstance(self.of, Float8):
            codes = raw.view(torch.uint8)
        elif raw.dtype == torch.int8:
            # Two's complement with its highest bit turned is the code plus 128.
            codes = raw.view(torch.uint8) ^ 0x80
        else:
            codes = unpack(raw, bits, self.in_features)
        n, k = self.out_features, self.in_features
        filled_n, filled_k = self.tiles * ROWS, self.blocks * per_word * SLICE
        if (filled_n, filled_k) != (n, k):
            codes = torch.nn.functional.pad(codes, (0, filled_k - k, 0, filled_n - n))
        split = codes.reshape(*codes.shape[:-2], self.tiles, ROWS, self.blocks, per_word, SLICE)
        words = torch.zeros(*split.shape[:-2], SLICE, dtype=torch.int16, device=raw.device)
        for place in range(per_word):
            words |= split[..., place, :].to(torch.int16) << (bits * place)
        arranged = {"qweight": words.transpose(-2, -3).contiguous()}
        for name in self._tiled_names():
            arranged[name] = self._arranged_groups(parts[name])
        if self.narrow:
            arranged["scales"] = arranged["scales"].bfloat16()
        return {**{name: part for name, part in parts.items() if name not in arranged}, **arranged}

    def _arranged_groups(self, values: Tensor) -> Tensor:
        # A view in bytes where torch has no padding for the dtype (powers of two).
        dtype = values.dtype
        if dtype == torch.float8_e8m0fnu:
            values = values.view(torch.uint8)
        shared = self.of.grid.rows  # type: ignore[attr-defined]
        if shared > 1:
            values = values.repeat_interleave(min(shared, self.out_features), dim=-2)[..., : self.out_features, :]
        filled = torch.nn.functional.pad(values, (0, 0, 0, self.tiles * ROWS - self.out_features))
        tiled = filled.reshape(*values.shape[:-2], self.tiles, ROWS // 16, 2, 8, values.shape[-1]).transpose(-2, -3)
        tiled = tiled.reshape(*values.shape[:-2], self.tiles, ROWS, values.shape[-1]).transpose(-1, -2).contiguous()
        return tiled.view(dtype)

    def plain(self, parts: Parts) -> tuple[Layout, dict[str, Tensor]]:
        words = parts["qweight"].transpose(-2, -3)
        bits, per_word = self.bits, self.per_word
        mask = (1 << bits) - 1
        places = [((words >> (bits * place)) & mask).to(torch.uint8) for place in range(per_word)]
        codes = torch.stack(places, dim=-2)
        codes = codes.reshape(*codes.shape[:-5], self.tiles * ROWS, self.blocks * per_word * SLICE)
        codes = codes[..., : self.out_features, : self.in_features]
        own: dict[str, Tensor] = {}
        if isinstance(self.of, Float8):
            own["qweight"] = codes.contiguous().view(self.of.dtype)
        elif getattr(self.of, "signed", False):
            own["qweight"] = (codes ^ 0x80).contiguous().view(torch.int8)
        else:
            own["qweight"] = pack(codes, bits)
        shared = self.of.grid.rows  # type: ignore[attr-defined]
        for name in self._tiled_names():
            tiled = parts[name].transpose(-1, -2)
            paired = tiled.reshape(*tiled.shape[:-2], ROWS // 16, 8, 2, tiled.shape[-1]).transpose(-2, -3)
            values = paired.reshape(*tiled.shape[:-3], self.tiles * ROWS, tiled.shape[-1])[..., : self.out_features, :]
            own[name] = (values[..., ::shared, :] if shared > 1 else values).contiguous()
        if self.narrow:
            own["scales"] = own["scales"].float()
        return self.of, {**{name: part for name, part in parts.items() if name not in own}, **own}

    def describe(self) -> dict[str, Any]:
        return {**self.of.describe(), "arranged": self.kind}

    def in_plain_order(self) -> Layout:
        return self.of

    # -- whatever is no product is done in the ordinary order ---------------------------------------------------------

    def scale_tensors(self) -> dict[str, Nested | None]:
        return self.of.scale_tensors()

    def check_values(self, parts: Parts) -> None:
        self.of.check_values(self.plain(parts)[1])

    def decode(self, parts: Parts) -> Tensor:
        return self.of.decode(self.plain(parts)[1])

    def nearest(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        plain = self.plain(parts)[1]
        return self._arranged({**plain, **self.of.nearest(weight, plain)})

    def fit(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        plain = self.plain(parts)[1]
        return self._arranged(self._shortened(weight, {**plain, **self.of.fit(weight, plain)}))

    def encode(self, weight: Tensor, parts: Parts, grid: GridPolicy = "best") -> dict[str, Tensor]:
        return self._arranged(self._shortened(weight, self.of.encode(weight, self.plain(parts)[1], grid)))

    def _shortened(self, weight: Tensor, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``plain``, fitted to ``weight``, with scales that can be held: rounded, and codes chosen by them."""
        if not self.narrow or _is_short(plain["scales"]):
            return plain
        plain = {**plain, "scales": plain["scales"].bfloat16().float()}
        return {**plain, **self.of.nearest(weight, plain)}

    def columns(self, parts: Parts) -> Columns | None:
        return self.of.columns(self.plain(parts)[1])

    def parts_of_columns(self, columns: Any, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        plain = self.plain(parts)[1]
        return self._arranged({**plain, **self.of.parts_of_columns(columns, values, plain)})

    def moved(self, update: Tensor, parts: Parts) -> dict[str, Tensor] | None:
        moved = self.of.moved(update, self.plain(parts)[1])
        return None if moved is None else self._arranged(moved)

    def with_rows(self, out_features: int) -> Layout:
        return dataclasses.replace(self, out_features=out_features, of=self.of.with_rows(out_features))

    def _shares_rows(self) -> bool:
        """Return whether a scale, or a second-level scale, may belong to rows of more than one tile."""
        return self.of.grid.rows > 1 or any(self.scale_tensors().values())  # type: ignore[attr-defined]

    def row_parts(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor] | None:
        whole_tiles = start % ROWS == 0 and (stop % ROWS == 0 or stop == self.out_features)
        if whole_tiles and not self._shares_rows():
            window = slice(start // ROWS, -(-stop // ROWS))
            kept = {name: parts[name] for name in self.of.core_specs()}
            for name in ("qweight", *self._tiled_names()):
                part = parts[name]
                kept[name] = part[..., window, :, :, :] if name == "qweight" else part[..., window, :, :]
            return kept
        cut = self.of.row_parts(self.plain(parts)[1], start, stop)
        if cut is None:
            return None
        other = self.with_rows(stop - start)
        assert isinstance(other, Tiled)
        return other._arranged(cut)

    def take_rows(self, parts: Parts, index: Tensor) -> tuple[Layout, dict[str, Tensor]] | None:
        return self.of.take_rows(self.plain(parts)[1], index)

    def stacked_rows(self, parts: Sequence[Parts], layouts: Sequence[Layout]) -> dict[str, Tensor] | None:
        whole_tiles = all(layout.out_features % ROWS == 0 for layout in layouts[:-1])
        if whole_tiles and not self._shares_rows():
            others = set(self.of.core_specs()) - {"qweight", *self._tiled_names()}
            if not all(rows.identical([one[name] for one in parts]) for name in others):
                return None
            joined = {name: torch.cat([one[name] for one in parts], dim=-3) for name in self._tiled_names()}
            words = torch.cat([one["qweight"] for one in parts], dim=-4)
            return {**{name: parts[0][name] for name in others}, **joined, "qweight": words}
        plain = []
        for layout, own in zip(layouts, parts, strict=True):
            assert isinstance(layout, Tiled)
            plain.append(layout.plain(own))
        stacked = self.of.stacked_rows([own for _, own in plain], [layout for layout, _ in plain])
        if stacked is None:
            return None
        total = self.with_rows(sum(layout.out_features for layout in layouts))
        assert isinstance(total, Tiled)
        return total._arranged(stacked)


def _is_short(scales: Tensor) -> bool:
    """Return whether ``scales`` are float32 of which bfloat16 holds every one."""
    if scales.dtype != torch.float32 or scales.device.type == "meta":
        return False
    return torch.equal(scales, scales.bfloat16().float())
