"""What may stand between a layer's input and output and its stored matrix: permutations, scales, Hadamard rotations.

With stored matrix S and transforms in order, a layer computes ``y = out_m(... out_1(S @ in_n(... in_1(x))))``, so the
dense weight is ``W = Out_m ... Out_1 S In_n ... In_1``. Sources: act-order permutation, GPTQ (Frantar et al. 2022,
section 3.3 step 1 as implemented upstream); input scales, AWQ (Lin et al. 2023, eq. 4); signs and Hadamard on both
sides, QuIP# (Tseng et al. 2024, section 3; its code divides inputs by scales besides, ``rescale_WH``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from qhub.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qhub.layouts.base import Layout, PartSpec

__all__ = ["Transform", "hadamard", "transform_input", "transform_output", "transform_weight", "with_input_scale"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_PARTS = {"permute": "perm", "scale": "scale", "divide": "divisor"}


@dataclass(frozen=True)
class Transform:
    """Names one step between input and stored matrix (``side="in"``) or stored matrix and output (``side="out"``).

    ``kind``: ``"permute"`` takes entry ``perm[j]`` to place j (part ``{side}_perm``, int32); ``"scale"`` multiplies by
    the vector ``{side}_scale``, ``"divide"`` divides by ``{side}_divisor``; ``"hadamard"`` multiplies by the normalised
    Hadamard matrix of the side's size.
    ``factor``: for ``"hadamard"``, the size q of a given q x q orthogonal factor (part ``{side}_hadamard``) where the
    size is q times a power of two; 1 means that the size is a power of two. An int8 factor is a Hadamard matrix,
    entries 1 and -1, that is divided by sqrt(q) where it is used.
    """

    kind: Literal["permute", "scale", "divide", "hadamard"]
    side: Literal["in", "out"]
    factor: int = 1

    @property
    def part(self) -> str | None:
        """Return the name of the tensor that the step needs; None when it needs none."""
        if self.kind == "hadamard":
            return f"{self.side}_hadamard" if self.factor > 1 else None
        return f"{self.side}_{_PARTS[self.kind]}"

    def part_specs(self, layout: Layout) -> dict[str, PartSpec]:
        """Return the tensors that the step adds to ``layout``."""
        from qhub.layouts.base import PartSpec

        size = layout.in_features if self.side == "in" else layout.out_features
        if self.kind == "hadamard":
            block = size // self.factor
            if block * self.factor != size or block & (block - 1):
                raise LayoutError(
                    f"a Hadamard rotation of size {size} with a factor of {self.factor} leaves "
                    f"{size / self.factor:g}, which is not a power of two"
                )
        if self.part is None:
            return {}
        if self.kind == "permute":
            return {self.part: PartSpec((size,), (torch.int32,))}
        if self.kind in ("scale", "divide"):
            return {self.part: PartSpec((size,), _FLOATS)}
        return {self.part: PartSpec((self.factor, self.factor), (*_FLOATS, torch.int8), batched=False)}

    def check_values(self, parts: Mapping[str, Tensor]) -> None:
        """Raise :class:`LayoutError` if the step's tensor is no permutation, no orthogonal matrix, or divides by 0."""
        if self.part is None or self.kind == "scale":
            return
        part = parts[self.part]
        if self.kind == "divide":
            if bool((part == 0).any()):
                raise LayoutError(f"tensor {self.part!r} holds 0, and inputs are divided by it: the file is damaged")
            return
        if self.kind == "permute":
            places = torch.arange(part.shape[-1], dtype=part.dtype, device=part.device)
            if not bool((part.sort(dim=-1).values == places).all()):
                raise LayoutError(
                    f"tensor {self.part!r} is no permutation of {part.shape[-1]} features: the file is damaged"
                )
            return
        matrix = _factor(part, torch.float64)
        defect = (matrix @ matrix.T - torch.eye(self.factor, dtype=torch.float64, device=part.device)).abs().max()
        # Each of a row's q products carries two roundings of entries up to 1 (of the stored dtype; of float64 for a
        # Hadamard matrix, whose entries are exact before they are divided).
        rounding = torch.finfo(part.dtype if part.is_floating_point() else torch.float64).eps
        if float(defect) > 2 * self.factor * rounding:
            raise LayoutError(
                f"tensor {self.part!r} is not orthogonal: its product with its transpose is off by {float(defect):.1e}"
            )

    def apply(self, x: Tensor, parts: Mapping[str, Tensor], inverse: bool = False) -> Tensor:
        """Return the step applied to the last dimension of ``x``; ``inverse`` undoes it."""
        part = parts[self.part] if self.part is not None else None
        if self.kind == "hadamard":
            return _rotate(x, None if part is None else _factor(part, x.dtype), inverse)
        assert part is not None
        if part.ndim > 1:
            part = part.reshape(*part.shape[:-1], *([1] * (x.ndim - part.ndim)), part.shape[-1])
        if self.kind in ("scale", "divide"):
            scale = part.to(x.dtype)
            if inverse == (self.kind == "divide"):
                return x * scale
            # A feature scaled by 0 cannot be told from any other: it is left as it is, without a division by 0.
            return x / torch.where(scale == 0, torch.ones_like(scale), scale)
        index = torch.argsort(part, dim=-1) if inverse else part
        index = index.to(torch.int64)
        if index.ndim == 1:
            return x.index_select(-1, index)
        return torch.gather(x, -1, index.expand(x.shape))


def transform_input(x: Tensor, layout: Layout, parts: Mapping[str, Tensor]) -> Tensor:
    """Return what the stored matrix is multiplied with when the layer's input is ``x`` (..., in_features)."""
    for transform in layout.transforms:
        if transform.side == "in":
            x = transform.apply(x, parts)
    return x


def transform_output(y: Tensor, layout: Layout, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the layer's output from the stored matrix' product ``y`` (..., out_features)."""
    for transform in layout.transforms:
        if transform.side == "out":
            y = transform.apply(y, parts)
    return y


def with_input_scale(layout: Layout) -> Layout:
    """Return ``layout`` with the input scaled (part ``in_scale``) before all else; as it is if it has that already."""
    scale = Transform("scale", "in")
    return layout if scale in layout.transforms else replace(layout, transforms=(scale, *layout.transforms))


def transform_weight(weight: Tensor, layout: Layout, parts: Mapping[str, Tensor], inverse: bool = False) -> Tensor:
    """Return the dense weight from the stored matrix (..., N, K), or with ``inverse`` the stored one from the dense."""
    inputs = [t for t in layout.transforms if t.side == "in"]
    outputs = [t for t in layout.transforms if t.side == "out"]
    for transform in inputs if inverse else reversed(inputs):
        weight = _times_input(weight, transform, parts, inverse)
    if outputs:
        columns = weight.transpose(-1, -2)
        for transform in reversed(outputs) if inverse else outputs:
            columns = transform.apply(columns, parts, inverse)
        weight = columns.transpose(-1, -2)
    return weight


def _times_input(weight: Tensor, transform: Transform, parts: Mapping[str, Tensor], inverse: bool) -> Tensor:
    """Return ``weight @ T`` for an input step T (``x -> T x``), or ``weight @ T^-1``.

    A row w of W meets x as w . (T x) = (T^t w) . x. A scale is its own transpose; permutation and rotation are
    orthogonal, so their transpose is their inverse.
    """
    if transform.kind in ("scale", "divide"):
        return transform.apply(weight, parts, inverse)
    return transform.apply(weight, parts, not inverse)


def hadamard(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the normalised Sylvester Hadamard matrix of a power-of-two ``size``; symmetric and orthogonal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix / math.sqrt(size)).to(dtype)


def _factor(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the orthogonal factor that ``part`` holds; integers are the entries of a Hadamard matrix."""
    if part.is_floating_point():
        return part.to(dtype)
    return part.to(dtype) / math.sqrt(part.shape[0])


def _rotate(x: Tensor, factor: Tensor | None, inverse: bool) -> Tensor:
    """Multiply the last dimension by factor (x) Sylvester by the fast Walsh-Hadamard transform: O(K log K)."""
    q = 1 if factor is None else factor.shape[0]
    size = x.shape[-1] // q
    out = x.reshape(-1, q, size)
    half = 1
    while half < size:
        pairs = out.reshape(out.shape[0], q, size // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        out = torch.stack([first + second, first - second], dim=-2).reshape(out.shape[0], q, size)
        half *= 2
    out = out * (1.0 / math.sqrt(size))
    if factor is not None:
        out = torch.matmul(factor.transpose(0, 1) if inverse else factor, out)
    return out.reshape(x.shape)
