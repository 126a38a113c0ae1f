"""Runs the kernel for many rows on Hopper: descriptors of what the unit that copies tiles reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qhub.layouts.tiled import Tiled
from qhub_triton.launch import Launch, processors
from qhub_triton.wide.tiles import HEIGHT, scaled_late, span_of

if TYPE_CHECKING:
    from qhub_triton.tiled.plans import Wide as WidePlan

__all__ = ["WideLaunch"]


class WideLaunch:
    """Is the kernel for one weight, inputs of ``dtype``, cut as ``plan``.

    ``tensors``: of :func:`qhub_triton.tiled.arguments.tensors_of`. ``constants``: those of
    :func:`qhub_triton.tiled.arguments.constants_of`, WHOLE and HAS_BIAS.
    """

    def __init__(
        self, layout: Tiled, tensors: tuple[Tensor, ...], constants: dict[str, Any], dtype: torch.dtype, plan: WidePlan
    ) -> None:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from qhub_triton.tiled.operands import TINY, unit_of
        from qhub_triton.wide.instructions import folds
        from qhub_triton.wide.kernel import REGISTERS, WARPS, wide

        words, scales = tensors[:2]
        self.layout, self.rest, self.split, self.rows = layout, tensors[1:4], plan.split, plan.rows
        self.index, self.processors = words.device.index or 0, processors(words.device)
        swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        held = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
        self.words = TensorDescriptor(words, [words.numel() // 32, 32], [32, 1], [64, 32], held)
        span = span_of(plan.rows, layout.per_word)
        # Of some x and y, to be checked once, and copied for each.
        n, k = layout.out_features, layout.in_features
        some = torch.empty(0, dtype=dtype, device=words.device)
        self.x = TensorDescriptor(some, [1, k], [k, 1], [plan.rows, span], swizzled)
        self.y = TensorDescriptor(some, [1, n], [n, 1], [plan.rows, HEIGHT // 2], swizzled)
        own = {name: constants[name] for name in ("BITS", "KIND", "GROUP", "ZERO", "ZERO_POINT", "WHOLE", "HAS_BIAS")}
        half, names, late = dtype == torch.float16, ("UNIT", "KIND", "BITS"), scaled_late(layout)
        own["UNIT"] = unit_of(*(constants[n] for n in names), half, True, own["ZERO"], own["ZERO_POINT"], True)
        if not late and folds(own["KIND"], own["BITS"], half, own["ZERO"], own["WHOLE"]):
            own["UNIT"] *= 2.0**TINY.value
        own["ROUNDS"] = scales.dtype == torch.float32 or (scales.dtype == torch.float16 and not half)
        own |= {
            "LATE": late, "STAGES": plan.stages, "SPLIT": plan.split, "TILE_N": HEIGHT, "TILE_M": plan.rows,
            "SPAN": span,
        }  # fmt: skip
        options = {"num_warps": WARPS, **({"maxnreg": REGISTERS} if plan.rows == 256 else {})}
        self.launch = Launch(wide, own, options, plain=frozenset({int, TensorDescriptor}))

    def tiles(self, m: int) -> int:
        """Return how many tiles the output of ``m`` rows has."""
        return -(-self.layout.out_features // HEIGHT) * -(-m // self.rows)

    def __call__(self, x: Tensor, bias: Tensor | None, y: Tensor, shares: Tensor, counters: Tensor) -> None:
        """Write ``x @ W.T + bias`` to ``y`` (M, N), for x (M, K) contiguous at a multiple of 16 bytes.

        ``shares``: split * rows * HEIGHT float32 for each tile; ``counters``: two int32 each, zero; for splits above 1.
        """
        m, n = x.shape[0], self.layout.out_features
        xd, yd = _of(self.x, x, [m, self.layout.in_features]), _of(self.y, y, [m, n])
        self.launch(
            (min(self.processors, self.tiles(m) * self.split), 1, 1), self.index, xd, self.words, *self.rest,
            self.rest[0] if bias is None else bias, yd, shares, counters, -(-n // HEIGHT), -(-m // self.rows), n,
            self.layout.blocks, self.layout.groups,
        )  # fmt: skip


def _of(described: Any, tensor: Tensor, shape: list[int]) -> Any:
    """Return the descriptor of another tensor, aligned as that of ``described`` is: making one anew checks all of it,
    which takes a few microseconds."""
    other = object.__new__(type(described))
    other.__dict__.update(described.__dict__)
    other.base, other.shape = tensor, shape
    return other
