"""The interface of a layout: how named tensors ("parts") stand for a dense weight matrix.

A layout is a small frozen description of ONE (out_features, in_features) matrix. Parts may carry leading batch
dimensions (fused mixture-of-experts weights are a batch of matrices); the description does not change with them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import rows
from qhub.layouts.activations import Activation
from qhub.layouts.transforms import Transform, transform_weight

if TYPE_CHECKING:
    from qhub.layouts.columns import Columns
    from qhub.layouts.nested import Nested

__all__ = ["UNMEASURED", "Activation", "GridPolicy", "Layout", "PartSpec", "Parts", "nbytes"]

Parts = Mapping[str, Tensor]
GridPolicy = Literal["keep", "refit", "best"]
# In the metadata of a layout's field: measurements are not told apart by it.
UNMEASURED = "unmeasured"

# Relative error up to which a weight counts as the one that is stored: rotations alone cost some 2^-20 in float32.
_ROUNDING = 2.0**-18


@dataclass(frozen=True)
class PartSpec:
    """Says what one tensor of a layout looks like, batch dimensions left out.

    ``shape``: of one matrix. ``dtypes``: those allowed. ``batched``: False for a table that all matrices of a batch
    share.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    batched: bool = True


@dataclass(frozen=True, kw_only=True)
class Layout(ABC):
    """Describes how named tensors stand for one (out_features, in_features) matrix.

    ``transforms``: what surrounds the stored matrix (permutation, scale, Hadamard), see :mod:`qhub.layouts.transforms`.
    ``activation``: how the layer's input is rounded.
    """

    kind: ClassVar[str]
    # Whether it is another layout's numbers in another order, that of a kernel; plain() then gives that layout.
    arranged: ClassVar[bool] = False

    out_features: int
    in_features: int
    transforms: tuple[Transform, ...] = ()
    activation: Activation = field(default_factory=Activation)

    # -- what a concrete layout says ---------------------------------------------------------------------------------

    @abstractmethod
    def core_specs(self) -> dict[str, PartSpec]:
        """Return the parts of the stored matrix, those of the transforms left out."""

    @abstractmethod
    def decode(self, parts: Parts) -> Tensor:
        """Return the stored matrix (..., out_features, in_features) in float32, transforms not applied."""

    @abstractmethod
    def nearest(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Return the codes nearest to ``weight`` (..., out_features, in_features) under the scales of ``parts``."""

    @abstractmethod
    def fit(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Return scales fitted to ``weight`` (..., out_features, in_features) and the codes nearest under them.

        ``parts``: give tables, and the dtypes of what is fitted.
        """

    @abstractmethod
    def row_parts(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor] | None:
        """Return the parts of rows [start, stop) of the stored matrix; None when they cannot be cut out exactly."""

    @abstractmethod
    def stacked_rows(self, parts: Sequence[Parts], layouts: Sequence[Layout]) -> dict[str, Tensor] | None:
        """Return the parts of the matrices ``parts`` on top of each other; None when that is not exact."""

    def columns(self, parts: Parts) -> Columns | None:
        """Return what rounds one stored matrix, unbatched, a few columns at a time under the scales of ``parts``.

        None where the layout cannot.
        """
        return None

    def parts_of_columns(self, columns: Any, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Return the codes for ``values`` (N, K), every column of which ``columns`` of :meth:`columns` rounded."""
        return self.nearest(values, parts)

    def moved(self, update: Tensor, parts: Parts) -> dict[str, Tensor] | None:
        """Return parts whose grid has moved by the mean of ``update`` (N, K) in each group, codes left as they are.

        None where the grid has nothing that can be moved freely. (Xu et al. 2023, "QA-LoRA", section 3.3: what is
        constant within a group fits into a float zero.)
        """
        return None

    def plain(self, parts: Parts) -> tuple[Layout, dict[str, Tensor]]:
        """Return a layout of the core's and its parts with the same weights: itself, unless a layout says the same in
        words of its own (blocks of a file, mapped as they are)."""
        return self, dict(parts)

    def in_plain_order(self) -> Layout:
        """Return the layout that :meth:`plain` gives where this one is :attr:`arranged`; itself where not."""
        return self

    def scale_tensors(self) -> dict[str, Nested | None]:
        """Return the names of the scale tensors, each with how it is quantized in turn; None for plain ones."""
        return {}

    def check_values(self, parts: Parts) -> None:
        """Raise :class:`LayoutError` if a part holds an impossible value; ``parts`` have passed :meth:`validate`.

        Impossible are NaN and infinity, a code outside its table, a permutation that names an entry twice, a divisor of
        0. On the meta device there is nothing to look at.
        """
        if any(part.device.type == "meta" for part in parts.values()):
            return
        for name, part in parts.items():
            if part.is_floating_point() and not bool(torch.isfinite(part.float()).all()):
                raise LayoutError(f"tensor {name!r} holds NaN or infinity: the file is damaged")
        for name, nested in self.scale_tensors().items():
            if nested is not None:
                nested.check_values(name, parts)
        for transform in self.transforms:
            transform.check_values(parts)
        self.activation.check_values(parts)

    # -- what all layouts share --------------------------------------------------------------------------------------

    def part_specs(self) -> dict[str, PartSpec]:
        """Return every tensor of the layout with its shape and dtypes."""
        specs = self.core_specs()
        for transform in self.transforms:
            specs.update(transform.part_specs(self))
        return {**specs, **self.activation.part_specs()}

    def batch_shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the leading dimensions that ``parts`` carry before those of one matrix."""
        for name, spec in self.part_specs().items():
            if spec.batched:
                part = parts[name]
                return tuple(part.shape[: part.ndim - len(spec.shape)])
        return ()

    def validate(self, parts: Parts) -> None:
        """Raise :class:`LayoutError` unless ``parts`` are exactly the tensors that the layout needs."""
        specs = self.part_specs()
        missing, surplus = sorted(set(specs) - set(parts)), sorted(set(parts) - set(specs))
        if missing or surplus:
            raise LayoutError(
                f"a {self.kind} layout of {self.out_features}x{self.in_features} needs the tensors {sorted(specs)}; "
                f"missing {missing}, surplus {surplus}"
            )
        batch = self.batch_shape(parts)
        for name, spec in specs.items():
            part = parts[name]
            expected = (*batch, *spec.shape) if spec.batched else spec.shape
            if tuple(part.shape) != expected:
                raise LayoutError(f"tensor {name!r} has shape {tuple(part.shape)}, expected {expected}")
            if part.dtype not in spec.dtypes:
                raise LayoutError(f"tensor {name!r} has dtype {part.dtype}, expected one of {list(spec.dtypes)}")

    def encode(self, weight: Tensor, parts: Parts, grid: GridPolicy = "best") -> dict[str, Tensor]:
        """Return parts for ``weight`` (..., out_features, in_features) float32, transforms already taken off.

        ``grid``: ``"keep"`` leaves scales and tables of ``parts`` alone and picks the nearest codes, ``"refit"`` fits
        the scales to ``weight``, ``"best"`` takes what is nearer to ``weight`` in the sum of squares, for each matrix
        of a batch.
        """
        if grid == "refit":
            return {**parts, **self.fit(weight, parts)}
        kept = {**parts, **self.nearest(weight, parts)}
        if grid == "keep":
            return kept
        return self._better(weight, kept, {**parts, **self.fit(weight, parts)})

    def _better(self, weight: Tensor, kept: dict[str, Tensor], fitted: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return per matrix whichever decodes nearer to ``weight``; ``kept`` where it is exact but for rounding."""
        kept_error, fitted_error = ((self.decode(parts) - weight).square().sum((-2, -1)) for parts in (kept, fitted))
        rounding = _ROUNDING**2 * weight.square().sum((-2, -1))
        change = (fitted_error < kept_error) & (kept_error > rounding)
        specs = self.part_specs()
        # A table that the matrices share is the same in both.
        return {
            name: torch.where(change[(..., *[None] * (part.ndim - change.ndim))], fitted[name], part)
            if specs[name].batched
            else part
            for name, part in kept.items()
        }

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense weight (..., out_features, in_features) that ``parts`` stand for, computed in float32."""
        return transform_weight(self.decode(parts), self, parts).to(dtype)

    def requantize(self, weight: Tensor, parts: Parts, grid: GridPolicy = "best") -> dict[str, Tensor]:
        """Return parts on this layout for the dense ``weight``; transforms and tables of ``parts`` are kept."""
        core = transform_weight(weight.float(), self, parts, inverse=True)
        return {**parts, **self.encode(core, parts, grid)}

    def with_rows(self, out_features: int) -> Layout:
        """Return the same layout for another number of rows."""
        return dataclasses.replace(self, out_features=out_features)

    def select_rows(self, parts: Parts, start: int, stop: int) -> tuple[Layout, dict[str, Tensor]] | None:
        """Return layout and parts of rows [start, stop); None when they cannot be cut out exactly."""
        if any(transform.side == "out" for transform in self.transforms):
            return None
        cut = self.row_parts(parts, start, stop)
        if cut is None:
            return None
        return self.with_rows(stop - start), {**cut, **{name: parts[name] for name in self._surrounding()}}

    def _surrounding(self) -> list[str]:
        """Return the names of the parts that belong to the transforms and the activation scheme."""
        return [*(name for t in self.transforms for name in t.part_specs(self)), *self.activation.part_specs()]

    def take_rows(self, parts: Parts, index: Tensor) -> tuple[Layout, dict[str, Tensor]] | None:
        """Return layout and parts of the rows ``index`` (count,) int64, in that order; None where rows share scales."""
        return None

    def concat_rows(self, parts: Sequence[Parts], layouts: Sequence[Layout]) -> tuple[Layout, dict[str, Tensor]] | None:
        """Return layout and parts of several matrices on top of each other; None when that is not exact."""
        total = sum(layout.out_features for layout in layouts)
        merged = self.with_rows(total)
        if any(layout.with_rows(total) != merged for layout in layouts):
            return None
        # Joining would promote a dtype, and with it perhaps the arithmetic of a formula.
        if any(other[name].dtype != part.dtype for other in parts[1:] for name, part in parts[0].items()):
            return None
        if any(transform.side == "out" for transform in self.transforms):
            return None
        shared = self._surrounding()
        if not all(rows.identical([one[name] for one in parts]) for name in shared):
            return None
        stacked = self.stacked_rows(parts, layouts)
        return None if stacked is None else (merged, {**stacked, **{name: parts[0][name] for name in shared}})

    def describe(self) -> dict[str, Any]:
        """Return the layout as plain data, for `qhub inspect` and for reports."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": self.kind, **{name: value for name, value in fields.items() if value not in (None, (), False)}}


def nbytes(parts: Parts) -> int:
    """Return how many bytes ``parts`` take in memory."""
    return sum(part.numel() * part.element_size() for part in parts.values())
