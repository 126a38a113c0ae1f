"""Rows of fixed-size records, kept as a file has them: the block types of GGUF, mapped without a copy.

A record holds a run of consecutive weights of one row, scales and codes together. What its bytes mean is the business
of a :class:`Record`, which a plugin brings; what can be done with a matrix of them is said here.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts.base import Layout, Parts, PartSpec
from qhub.layouts.chunks import row_chunks
from qhub.layouts.columns import Columns

__all__ = ["Blocks", "Record"]


class Record(ABC):
    """Says what the bytes of one kind of record mean. Stateless; two records of one name are the same.

    ``name``: unique among all kinds. ``count``: weights in a record. ``size``: bytes of a record. Tensors of records
    have shape (..., size) uint8 with any strides, those of weights (..., count) float32.
    """

    name: str
    count: int
    size: int

    @abstractmethod
    def decode(self, data: Tensor) -> Tensor:
        """Return the weights (..., count) float32 of the records ``data`` (..., size)."""

    @abstractmethod
    def nearest(self, weights: Tensor, data: Tensor) -> Tensor:
        """Return records with the scales of ``data`` (..., size) and the codes nearest to ``weights`` (..., count)."""

    @abstractmethod
    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Tensor:
        """Return records (..., size) near to ``weights`` (..., count), their scales fitted too.

        ``importance``: (..., count), broadcastable, what the square of each error counts; None: the record's own
        choice.
        """

    @abstractmethod
    def scales(self, data: Tensor) -> Tensor:
        """Return the scales (..., any) of ``data`` in float32: NaN or infinite where the record cannot be decoded."""

    @abstractmethod
    def plain(self, out_features: int, in_features: int, blocks: Tensor) -> tuple[Layout, dict[str, Tensor]]:
        """Return a layout of the core's and its parts for ``blocks`` (..., N, K/count*size): the same weights."""

    def from_plain(self, layout: Layout, parts: Parts) -> Tensor | None:
        """Return blocks (..., N, K/count*size) that hold exactly the stored matrix of ``layout``; None if none can."""
        return None

    def columns(self, data: Tensor) -> Columns | None:
        """Return what rounds a few columns at a time under the scales of ``data`` (N, K/count, size); None: nothing."""
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        # Layouts are told apart by this, in every process.
        return f"Record({self.name})"


@dataclass(frozen=True, kw_only=True)
class Blocks(Layout):
    """Stores rows of records.

    Part: ``blocks`` (N, K/record.count*record.size) uint8. Rows share nothing, so they can be cut, taken and stacked
    freely.
    """

    kind: ClassVar[str] = "blocks"

    record: Record

    def __post_init__(self) -> None:
        if self.in_features % self.record.count:
            raise LayoutError(
                f"{self.record.name} holds runs of {self.record.count} weights of a row: they do not divide the "
                f"{self.in_features} input features of a {self.out_features}x{self.in_features} matrix"
            )

    @property
    def row_bytes(self) -> int:
        """Return the length of a row."""
        return self.in_features // self.record.count * self.record.size

    def core_specs(self) -> dict[str, PartSpec]:
        return {"blocks": PartSpec((self.out_features, self.row_bytes), (torch.uint8,))}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "record": self.record.name}

    def check_values(self, parts: Parts) -> None:
        super().check_values(parts)
        blocks = parts["blocks"]
        if blocks.device.type == "meta":
            return
        rows = blocks.reshape(-1, blocks.shape[-1])
        for piece in row_chunks(rows.shape[0], self.in_features, blocks.device):
            # Codes of any value are legal; only scales can spoil a weight.
            if not bool(torch.isfinite(self.record.scales(self._records(rows[piece]))).all()):
                raise LayoutError(
                    f"tensor 'blocks' ({self.record.name}) holds a scale that is NaN or infinite in rows {piece.start} "
                    f"to {piece.stop - 1}: the file is damaged"
                )

    def _records(self, blocks: Tensor) -> Tensor:
        """View ``blocks`` (..., row_bytes) as records (..., K/count, size)."""
        return blocks.unflatten(-1, (self.in_features // self.record.count, self.record.size))

    def _runs(self, weight: Tensor) -> Tensor:
        """View ``weight`` (..., K) as runs (..., K/count, count)."""
        return weight.unflatten(-1, (self.in_features // self.record.count, self.record.count))

    # -- reading -----------------------------------------------------------------------------------------------------

    def decode(self, parts: Parts) -> Tensor:
        return self._decode(parts, torch.float32)

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().dequantize(parts, dtype) if self.transforms else self._decode(parts, dtype)

    def _decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """Return the stored matrix in ``dtype``; what is held in between is that of a few rows."""
        blocks = parts["blocks"]
        rows = blocks.reshape(-1, blocks.shape[-1])
        pieces = list(row_chunks(rows.shape[0], self.in_features, blocks.device))
        if len(pieces) == 1:
            weight = self.record.decode(self._records(rows)).flatten(-2).to(dtype)
        else:
            weight = torch.empty(rows.shape[0], self.in_features, dtype=dtype, device=blocks.device)
            for piece in pieces:
                weight[piece] = self.record.decode(self._records(rows[piece])).flatten(-2)
        return weight.reshape(*blocks.shape[:-1], self.in_features)

    def plain(self, parts: Parts) -> tuple[Layout, dict[str, Tensor]]:
        """Return the same weights, bit for bit, on a layout whose scales and codes are tensors of their own."""
        layout, own = self.record.plain(self.out_features, self.in_features, parts["blocks"])
        layout = dataclasses.replace(layout, transforms=self.transforms, activation=self.activation)
        return layout, {**own, **{name: parts[name] for name in self._surrounding()}}

    def of_plain(self, layout: Layout, parts: Parts) -> dict[str, Tensor] | None:
        """Return parts that hold exactly the stored matrix of another ``layout``; None where records cannot."""
        if (layout.out_features, layout.in_features) != (self.out_features, self.in_features):
            return None
        blocks = self.record.from_plain(layout, parts)
        return None if blocks is None else {"blocks": blocks}

    # -- writing -----------------------------------------------------------------------------------------------------

    def nearest(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        blocks = parts["blocks"]
        old = blocks.reshape(-1, blocks.shape[-1])
        return self._written(weight, lambda w, piece: self.record.nearest(w, self._records(old[piece])))

    def fit(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        return self.fitted(weight)

    def fitted(self, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        """Return parts near to ``weight`` (..., N, K) of any float dtype, from nothing.

        ``importance``: (K,), what the square of an error counts in each column; None: the record's own choice.
        """
        runs = None if importance is None else self._runs(importance.float().to(weight.device))
        return self._written(weight, lambda w, piece: self.record.fit(w, runs))

    def _written(self, weight: Tensor, write: Callable[[Tensor, slice], Tensor]) -> dict[str, Tensor]:
        """Return the part that ``write`` gives for runs of ``weight`` and the slice of rows that they are."""
        flat = weight.reshape(-1, self.in_features)
        blocks = torch.empty(flat.shape[0], self.row_bytes, dtype=torch.uint8, device=weight.device)
        for piece in row_chunks(flat.shape[0], self.in_features, weight.device):
            blocks[piece] = write(self._runs(flat[piece].float()), piece).flatten(-2)
        return {"blocks": blocks.reshape(*weight.shape[:-1], self.row_bytes)}

    def columns(self, parts: Parts) -> Columns | None:
        return self.record.columns(self._records(parts["blocks"]))

    # -- rows --------------------------------------------------------------------------------------------------------

    def row_parts(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor] | None:
        return {"blocks": parts["blocks"][..., start:stop, :]}

    def take_rows(self, parts: Parts, index: Tensor) -> tuple[Layout, dict[str, Tensor]] | None:
        if any(transform.side == "out" for transform in self.transforms):
            return None
        return self.with_rows(index.shape[0]), {**parts, "blocks": parts["blocks"].index_select(-2, index)}

    def stacked_rows(self, parts: Sequence[Parts], layouts: Sequence[Layout]) -> dict[str, Tensor] | None:
        return {"blocks": torch.cat([p["blocks"] for p in parts], dim=-2)}
