"""Runs the kernel for many rows on Hopper: descriptors of what the unit that copies tiles reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qhub.layouts.tiled import Tiled
from qhub_triton.launch import Launch, processors

if TYPE_CHECKING:
    from qhub_triton.tiled.plans import Wide as WidePlan

__all__ = ["TILE", "WideLaunch", "stages_for"]

# Rows of W, and of x, of a tile.
TILE = 128
# A processor of an H100 has 227 KiB of shared memory for a program; a tile of y, and barriers, take some of it.
_SHARED = (227 << 10) - TILE * TILE * 2 - 1024


def stages_for(layout: Tiled) -> int:
    """Return how many blocks of columns fit in shared memory at once."""
    return _SHARED // (TILE * layout.per_word * 64 + TILE * 64)


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

        from qhub_triton.tiled.operands import unit_of
        from qhub_triton.wide.kernel import WARPS, wide

        words, scales = tensors[:2]
        self.layout, self.rest, self.split = layout, tensors[1:4], plan.split
        self.index, self.processors = words.device.index or 0, processors(words.device)
        self.described = TensorDescriptor
        self.swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        held = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
        self.words = TensorDescriptor(words, [words.numel() // 32, 32], [32, 1], [64, 32], held)
        self.block = [TILE, layout.per_word * 32]
        own = {name: constants[name] for name in ("BITS", "KIND", "GROUP", "ZERO", "ZERO_POINT", "WHOLE", "HAS_BIAS")}
        half, names = dtype == torch.float16, ("UNIT", "KIND", "BITS")
        own["UNIT"] = unit_of(*(constants[n] for n in names), half, True, own["ZERO"], own["ZERO_POINT"], True)
        own["ROUNDS"] = scales.dtype == torch.float32 or (scales.dtype == torch.float16 and not half)
        own |= {"STAGES": plan.stages, "SPLIT": plan.split, "TILE": TILE}
        self.launch = Launch(wide, own, {"num_warps": WARPS}, plain=frozenset({int, TensorDescriptor}))

    def tiles(self, m: int) -> int:
        """Return how many tiles the output of ``m`` rows has."""
        return -(-self.layout.out_features // TILE) * -(-m // TILE)

    def __call__(self, x: Tensor, bias: Tensor | None, y: Tensor, shares: Tensor, counters: Tensor) -> None:
        """Write ``x @ W.T + bias`` to ``y`` (M, N), for x (M, K) contiguous at a multiple of 16 bytes.

        ``shares``: split * TILE * TILE float32 for each tile; ``counters``: two int32 each, zero; for a split above 1.
        """
        m, k, n = x.shape[0], self.layout.in_features, self.layout.out_features
        xd = self.described(x, [m, k], [k, 1], self.block, self.swizzled)
        yd = self.described(y, [m, n], [n, 1], [TILE, TILE // 2], self.swizzled)
        self.launch(
            (min(self.processors, self.tiles(m) * self.split), 1, 1), self.index, xd, self.words, *self.rest,
            self.rest[0] if bias is None else bias, yd, shares, counters, -(-n // TILE), -(-m // TILE), n,
            self.layout.blocks, self.layout.groups,
        )  # fmt: skip
