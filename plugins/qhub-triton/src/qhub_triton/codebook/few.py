"""Few rows of input on NVIDIA's GPUs: which of a weight's vectors fit which kernel, and the launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qhub.layouts import Codebook, Parts
from qhub_triton.codebook.fragments import MASKS, fragments_kernel, shapes
from qhub_triton.codebook.lattice import Words, words_of
from qhub_triton.codebook.tabulated import BLOCKS, tabulated_kernel, tabulated_shapes
from qhub_triton.launch import Launch

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
    """Holds one weight's arguments. ``tabulates``: whether one row of input is multiplied by tables."""

    def __init__(
        self, layout: Codebook, parts: Parts, words: Words | None, books: Tensor | None, config: dict[str, Any]
    ) -> None:
        self.layout, self.parts, self.words, self.books = layout, parts, words, books
        self.version = _version(parts["codebooks"])
        self.n, self.blocks = layout.out_features, layout.in_features // _WIDTH
        self.index = parts["codes"].device.index or 0
        self.processors = torch.cuda.get_device_properties(parts["codes"].device).multi_processor_count
        self.tabulates = words is None and layout.nbits == (8, 8) and config.get("tables") is not False
        warps, tall = self._fragments()
        self.warps, self.tall = config.get("warps", warps), config.get("tall", tall)
        chosen = config.get("tables")
        self.tables = tuple(chosen) if isinstance(chosen, (list, tuple)) else self._tables()
        self.launches: dict[Any, Launch] = {}

    def stale(self) -> bool:
        """Return whether the codebooks have been written into since they were looked at."""
        return _version(self.parts["codebooks"]) != self.version

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

    def fragments(self, x: Tensor, sums: Tensor | None, overlap: bool) -> Tensor:
        """Return x (M, K) float16 contiguous times the stored matrix, (1, M, N) float32; M at most 16.

        ``sums`` (M, count, 2): what the inputs add up to, for words.
        """
        m, layout, words = x.shape[0], self.layout, self.words
        warps, tall, wide = self.warps, self.tall, 8 if m <= 8 else 16
        codes, pack = self._packed()
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

    def tabulated(self, x: Tensor, overlap: bool) -> Tensor:
        """Return x (1, K) times the stored matrix, (splits, 1, N) float32."""
        rows, turns, warps, ahead, merged = self.tables
        slabs = -(-self.blocks // BLOCKS)
        key = (x.dtype, overlap, x.data_ptr() % 16)
        launch = self.launches.get(key)
        if launch is None:
            constants = {
                "BN": rows, "TURNS": turns, "AHEAD": ahead, "MERGED": merged,
                "EVEN": self.n % (rows * turns) == 0 == self.blocks % BLOCKS, "OVERLAP": overlap,
                **tabulated_shapes(warps),
            }  # fmt: skip
            extra = {"launch_pdl": True} if overlap else {}
            launch = self.launches[key] = Launch(tabulated_kernel, constants, {"num_warps": warps, **extra})
        partial = torch.empty(slabs, 1, self.n, dtype=torch.float32, device=x.device)
        launch(
            (-(-self.n // (rows * turns)), slabs, 1), self.index, x, self.books,
            self.parts["codes"].view(torch.int16), partial, self.n, self.blocks,
        )  # fmt: skip
        return partial

    def _fragments(self) -> tuple[int, int]:
        """Return warps and rows, in 16, of a program of fragments: few tall programs where there are enough of them,
        more warps for each where rows are few and long. Measured on an H100."""
        programs = -(-self.n // 16)
        if programs < 4 * self.processors and self.blocks >= 1024:
            return 8, 1
        return 4, 2 if programs >= 4 * self.processors - 16 else 1

    def _tables(self) -> tuple[int, int, int, int, bool]:
        """Return rows at a time, turns and warps of a tabulating program, turns that codes are read ahead, and whether
        both tables lie in shared memory."""
        return 256, 1, 16, 1, False
