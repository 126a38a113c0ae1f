"""Launches of what stands around a product: inputs rotated and made float16, outputs rotated, scaled, biased."""

from __future__ import annotations

import math
from typing import Any

import triton
from torch import Tensor

from qhub.layouts import Parts
from qhub_triton.codebook.reading import Side
from qhub_triton.codebook.rotation import narrow_kernel, rotate_kernel
from qhub_triton.launch import Launch

__all__ = ["Turning"]

# Rows of the matrix view that a program makes, and columns of the first factor's matrix that it takes at a time.
_ROWS, _COLUMNS = 16, 64


class Turning:
    """Is one side of a weight: the inputs' or the outputs'.

    ``size``: features. ``narrow``: results are float16 with a power of two for each row, else of the dtype asked for.
    """

    def __init__(self, side: Side, size: int, parts: Parts, index: int, narrow: bool, wide: bool) -> None:
        self.side, self.size, self.index, self.narrow, self.wide = side, size, index, narrow, wide
        tensors = {}
        for name in ("divide", "before", "rotate", "after"):
            step = getattr(side, name)
            tensors[name] = None if step is None or step.part is None else parts[step.part]
        self.divide, self.before, self.factor, self.after = tensors.values()
        self.q = 1 if side.rotate is None else side.rotate.factor
        self.launches: dict[Any, Launch] = {}
        power = size // self.q
        # The matrix view is about as tall as it is wide; its width is at least 16, the narrowest product.
        self.b = max(16, min(64, 1 << (power.bit_length() // 2)))
        self.norm = 1.0 / math.sqrt(power)
        if self.factor is not None and not self.factor.is_floating_point():
            self.norm = 1.0 / math.sqrt(size)
        self.spread = math.ceil(math.log2(size) / 2)

    @property
    def programs(self) -> int:
        """Return how many programs make one row."""
        return 1 if self.side.rotate is None else -(-(self.size // self.b) // _ROWS)

    def __call__(
        self, x: Tensor, out: Tensor, lengths: Tensor, sums: Tensor | None, bias: Tensor | None, scales: Tensor | None,
        scale_rows: int, overlap: bool,
    ) -> None:  # fmt: skip
        """Write ``out`` (M, size) from ``x`` (M, size) contiguous.

        ``lengths`` (M,) float32: with ``narrow`` what the results were divided by, for each row; else, with ``scales``,
        what the rows of x are multiplied by, as entry n is by ``scales[n // scale_rows]``. ``sums`` (M, programs, 2)
        float32: with ``narrow``, see :func:`qhub_triton.codebook.rotation.rotate_kernel`.
        """
        key = (x.dtype, x.data_ptr() % 16, out.dtype, bias is not None, scales is not None, overlap)
        launch = self.launches.get(key)
        if launch is None:
            launch = self.launches[key] = self._launch(bias is not None, scales, overlap)
        none = out
        divide = none if self.divide is None else self.divide
        before = none if self.before is None else self.before
        if self.side.rotate is None:
            launch((x.shape[0], 1, 1), self.index, x, out, lengths, none if sums is None else sums, divide, before,
                   self.size)  # fmt: skip
            return
        tall = self.size // self.b
        launch(
            (-(-tall // _ROWS), x.shape[0], 1), self.index, x, out, lengths, none if sums is None else sums,
            divide, before, none if self.factor is None else self.factor, none if self.after is None else self.after,
            none if bias is None else bias, none if scales is None else scales, self.size, tall, tall // self.q,
            self.q, self.spread, scale_rows,
        )  # fmt: skip

    def _launch(self, biased: bool, scales: Tensor | None, overlap: bool) -> Launch:
        given = {"HAS_DIVISOR": self.divide is not None, "HAS_BEFORE": self.before is not None}
        extra = {"launch_pdl": True} if overlap else {}
        if self.side.rotate is None:
            constants = {**given, "OVERLAP": overlap, "B": triton.next_power_of_2(self.size)}
            return Launch(narrow_kernel, constants, {"num_warps": 8 if self.size > 2048 else 4, **extra})
        constants = {
            **given, "HAS_FACTOR": self.factor is not None, "HAS_AFTER": self.after is not None, "HAS_BIAS": biased,
            "HAS_SCALES": scales is not None, "ONE_SCALE": scales is not None and scales.numel() == 1,
            "NARROW": self.narrow, "WIDE": self.wide, "OVERLAP": overlap, "NORM": self.norm,
            "RA": _ROWS, "CA": _COLUMNS, "B": self.b,
        }  # fmt: skip
        return Launch(rotate_kernel, constants, {"num_warps": 4, "num_stages": 2, **extra})
