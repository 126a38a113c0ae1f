"""Few rows of input on NVIDIA's GPUs: which of a weight's vectors fit which kernel, and the launches."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qhub.layouts import Codebook, Parts
from qhub_triton.codebook.fragments import MASKS, fragments_kernel, shapes
from qhub_triton.codebook.lattice import Words, words_of
from qhub_triton.codebook.tabulated import BLOCKS, tabulated_kernel, tabulated_shapes
from qhub_triton.launch import Launch, processors, stream_of
from qhub_triton.tiled.counters import SIZE, counters, prepare

__all__ = ["Few", "few_of"]

_WIDTH = 8
# Integers that hold the codes of one block.
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def few_of(layout: Codebook, parts: Parts, config: dict[str, Any]) -> Few | None:
    """Return the launches for a weight; None where its vectors are of no kind that the kernels know.

    Reads the codebooks, so the host waits for the device.
    """
    if layout.in_group != _WIDTH or layout.out_features * layout.in_features >= 1 << 34:
        return None
    codebooks = parts["codebooks"]
    words = words_of(layout, codebooks)
    if words is not None:
        return Few(layout, parts, words, None, config)
    if any(shift is not None for shift in layout.folded) or any(divisor != 1.0 for divisor in layout.divisors):
        return None
    sizes = {1 if bits <= 8 else 2 for bits in layout.nbits}
    if len(sizes) > 1 or len(set(layout.nbits)) > 1 or max(sizes) * len(layout.nbits) not in _WORDS:
        return None
    half = codebooks.to(torch.float16)
    # Sums are of what the layout holds: other dtypes only where float16 holds the same numbers.
    if codebooks.dtype != torch.float16 and not torch.equal(half.to(codebooks.dtype), codebooks):
        return None
    return Few(layout, parts, None, half, config)


def _version(part: Tensor) -> int:
    # Tensors made under inference_mode count no changes.
    return 0 if part.is_inference() else part._version


class Few:
    """Holds one weight's arguments. ``tabulates``: whether one row of input is multiplied by tables.

    ``plan``: warps and rows, in 16, of a program of fragments. ``tables``: rows and warps of a tabulating program, the
    codes of how many neighbouring blocks a lane reads at once (1 or 2), how many programs share a multiprocessor's
    registers, whether both tables lie in shared memory together.
    """

    def __init__(
        self, layout: Codebook, parts: Parts, words: Words | None, books: Tensor | None, config: dict[str, Any]
    ) -> None:
        self.layout, self.parts, self.words, self.books = layout, parts, words, books
        self.version = _version(parts["codebooks"])
        self.n, self.blocks = layout.out_features, layout.in_features // _WIDTH
        self.index = parts["codes"].device.index or 0
        self.processors = processors(parts["codes"].device)
        warps, tall = self._fragments()
        self.plan: tuple[int, int] = config.get("warps", warps), config.get("tall", tall)
        chosen = config.get("tables")
        self.tables = tuple(chosen) if isinstance(chosen, (list, tuple)) else self._tables()
        self.tabulates = words is None and layout.nbits == (8, 8) and chosen is not False
        if self.tabulates:
            prepare(parts["codes"].device)
            self.tabulates = self.blocks <= BLOCKS or -(-self.n // self.tables[0]) <= SIZE
        self.launches: dict[Any, Launch] = {}

    def stale(self) -> bool:
        """Return whether the codebooks have been written into since they were looked at."""
        return _version(self.parts["codebooks"]) != self.version

    # Views are made once: on a slow host each takes as long as a launch.
    @cached_property
    def _packed(self) -> tuple[Tensor, int]:
        """Return the codes as integers of several blocks' codes, and of how many; 0 for bytes of a code of three."""
        codes = self.parts["codes"]
        size = codes.shape[-1] * codes.element_size()
        if size not in _WORDS:
            return codes, 0
        pack = 4 // size
        if self.blocks % pack:
            return codes.view(_WORDS[size]), 1
        return codes.flatten(-2).view(torch.int32), pack

    @cached_property
    def _tabled(self) -> Tensor:
        """Return the codes as integers of those that a lane reads at once for tables."""
        return self.parts["codes"].flatten(-2).view(_WORDS[2 * self.tables[2]])

    def fragments(self, x: Tensor, sums: Tensor | None, overlap: bool) -> Tensor:
        """Return x (M, K) float16 contiguous times the stored matrix, (1, M, N) float32; M at most 16.

        ``sums`` (M, count, 2): what the inputs add up to, for words.
        """
        m, layout, words = x.shape[0], self.layout, self.words
        (warps, tall), wide = self.plan, 8 if m <= 8 else 16
        codes, pack = self._packed
        count = 1 if sums is None else sums.shape[1]
        key = (wide, overlap, x.data_ptr() % 16)
        launch = self.launches.get(key)
        part = -(-self.blocks // (32 * warps)) * 32
        if launch is None:
            bits = layout.nbits[0]
            constants = {
                "KIND": 0 if words is None else words.kind, "C": len(layout.nbits), "BITS": 8 if bits <= 8 else 16,
                "ENTRIES": 1 << bits, "STEPS": words.steps if words else (1.0, 1.0),
                "ZEROS": words.zeros if words else (0.0, 0.0), "PACK": pack, "EVEN": part * warps == self.blocks,
                "OVERLAP": overlap, "W": warps, "R": tall, "MX": wide, **shapes(warps, tall, wide, pack),
            }  # fmt: skip
            extra = {"launch_pdl": True} if overlap else {}
            launch = self.launches[key] = Launch(fragments_kernel, constants, {"num_warps": warps, **extra})
        out = torch.empty(1, m, self.n, dtype=torch.float32, device=x.device)
        tables = (self.books,) * 3 if words is None else (words.rows, words.signs, words.second)
        launch(
            (-(-self.n // (16 * tall)), 1, 1), self.index, x, codes, *tables, out, out if sums is None else sums, m,
            self.n, self.blocks, part, count, 4, *MASKS,
        )  # fmt: skip
        return out

    def tabulated(self, x: Tensor, bias: Tensor | None, scale_rows: int, overlap: bool) -> Tensor:
        """Return x (1, K) times the weight, scales and ``bias`` (N,) with it, (1, N) in x's dtype.

        ``scale_rows``: rows that share a scale.
        """
        rows, warps, pack, beside, merged = self.tables
        tiles, splits = -(-self.n // rows), -(-self.blocks // (BLOCKS * pack))
        aligned = x.data_ptr() % 16 == 0 and (bias is None or bias.data_ptr() % 16 == 0)
        key = (x.dtype, overlap, aligned, bias is not None)
        launch = self.launches.get(key)
        if launch is None:
            constants = {
                "BLOCKS": self.blocks, "PACK": pack, "SPLITS": splits, "BN": rows, "MERGED": merged,
                "EVEN": self.n % rows == 0 == self.blocks % (BLOCKS * pack), "HAS_BIAS": bias is not None,
                "OVERLAP": overlap, **tabulated_shapes(rows, warps, splits),
            }  # fmt: skip
            # Registers of a multiprocessor, shared out to the programs that are to work on it side by side.
            extra = {"maxnreg": min(255, 65536 // (32 * warps * beside)), **({"launch_pdl": True} if overlap else {})}
            launch = self.launches[key] = Launch(tabulated_kernel, constants, {"num_warps": warps, **extra})
        y = torch.empty(1, self.n, dtype=x.dtype, device=x.device)
        shares, arrived = self.books, self.books
        if splits > 1:
            shares = torch.empty(tiles * splits * rows, dtype=torch.float32, device=x.device)
            arrived = counters(x.device, stream_of(self.index))
        launch(
            (tiles * splits, 1, 1), self.index, x, self.books, self._tabled, self.parts["scales"],
            x if bias is None else bias, y, shares, arrived, self.n, scale_rows,
        )  # fmt: skip
        return y

    def _fragments(self) -> tuple[int, int]:
        """Return warps and rows, in 16, of a program of fragments. Measured on an H100 with 1 row of input.

        Small programs where there are several for each processor. Else more warps for each; words of one book leave
        registers for 32 rows, two books do not.
        """
        if self.blocks < 8 * 32:
            return 4, 1
        if -(-self.n // 16) >= 3 * self.processors:
            return 4, 1 if self.words is not None else 2
        return 8, 2 if self.words is not None and self.words.kind == 1 else 1

    def _tables(self) -> tuple[int, int, int, int, bool]:
        """Return a tabulating program. Measured on an H100."""
        rows = 512
        programs = -(-self.n // rows) * -(-self.blocks // (2 * BLOCKS))
        # Two blocks for one sum over lanes, where there are programs for all processors then.
        pack = 2 if self.blocks % 2 == 0 and programs >= self.processors else 1
        return rows, 16, pack, 1, False
