"""QuIP#'s codebooks: which 8 weights each code stands for (Tseng et al. 2024, section 4.2 and appendix C).

E8P is a coset of the lattice D8 cut to 256 magnitudes, with signs, shifted by 1/4 to either side: 16 bits. The third
bit of E8P12RVQ3B is a second code of 8 bits into 256 short vectors of E8; E8P12RVQ4B has a second E8P code. Both are
added divided by a scale (residual vector quantization).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qhub.layouts import Codebook, Grid, Transform

__all__ = ["CODEBOOKS", "SHIFT", "CodebookKind", "code_tables", "lattice_layout"]

WIDTH = 8
SHIFT = 0.25


@dataclass(frozen=True)
class CodebookKind:
    """Describes one of QuIP#'s codebooks.

    ``number``: the ``codebook_id`` in a file. ``version``: the ``codebook_version`` of a config. ``nbits``: of each
    code. ``residual_scale``: what the second code's vector is divided by where the config does not say; None where
    there is no second code. ``packsz``: what a config calls so. Source: QuIP#'s lib/codebook.
    """

    number: int
    version: int
    nbits: tuple[int, ...]
    residual_scale: float | None
    packsz: float

    @property
    def words(self) -> tuple[int, ...]:
        """Return how many weights of a row one 64-bit word of ``Qidxs`` holds, for each code."""
        return tuple(64 // bits * WIDTH for bits in self.nbits)


CODEBOOKS = {
    "E8P12": CodebookKind(7, 1, (16,), None, 4),
    "E8P12RVQ4B": CodebookKind(17, 1, (16, 16), 3.45, 2),
    "E8P12RVQ3B": CodebookKind(18, 0, (16, 8), 2.04, 8 / 3),
}

# The magnitudes of squared norm 12 that complete the 227 shorter ones, times 2, in the order of their codes: a choice
# of 29 among the 56 with five entries of 3/2 (QuIP#, appendix C; lib/codebook/latticee8_padded12.py).
_NORM_12 = (
    "31113333", "13113333", "11313333", "11133333", "33313311", "33313131", "33311331", "33313113", "33311313",
    "33311133", "33133311", "33133131", "33131331", "33133113", "33131313", "33131133", "31333311", "31333131",
    "31331331", "31333113", "31331313", "13331133", "13333311", "13333131", "13331331", "13333113", "13331313",
    "11331333", "33113331",
)  # fmt: skip


@cache
def code_tables(name: str) -> Tensor:
    """Return the tables of the codebook ``name``: (C, 256, 1, 8) float16 on the CPU. All callers share the tensor."""
    tables = [_e8p_rows() if bits == 16 else _shortest_of_e8() for bits in CODEBOOKS[name].nbits]
    # Entries are multiples of 1/2 up to 5/2: exact.
    return torch.tensor(tables, dtype=torch.float16, device="cpu").unsqueeze(2)


def _e8p_rows() -> list[list[float]]:
    """Return the 256 magnitudes; where they add up to an odd number, the last one is negative."""
    short = sorted(v for v in itertools.product((0.5, 1.5, 2.5), repeat=WIDTH) if sum(c * c for c in v) <= 10)
    rows = [list(v) for v in short] + [[int(digit) / 2 for digit in word] for word in _NORM_12]
    return [[*row[:-1], -row[-1] if sum(row) % 2 else row[-1]] for row in rows]


def _shortest_of_e8() -> list[list[float]]:
    """Return the zero vector and the 240 of squared norm 2 in E8, whole numbers first, each kind in lexicographic
    order; then 15 with one entry of 2 or -2, in this order: the sixteenth would be the 257th vector."""
    whole = [v for v in itertools.product((-1.0, 0.0, 1.0), repeat=WIDTH) if sum(c * c for c in v) in (0.0, 2.0)]
    halves = [v for v in itertools.product((-0.5, 0.5), repeat=WIDTH) if sum(v) % 2 == 0]
    longer = [[2.0 * sign * (i == j) for i in range(WIDTH)] for sign in (1.0, -1.0) for j in range(WIDTH)]
    return [*map(list, whole), *map(list, halves), *longer[:-1]]


def lattice_layout(
    name: str,
    out_features: int,
    in_features: int,
    residual_scale: float | None,
    factors: tuple[int, int],
    rescaled: bool,
) -> Codebook:
    """Return the layout W = diag(SV) H_N What H_K diag(SU / scaleWH), What = Wscale * (vector + residual / scale).

    ``residual_scale``: None for the codebook's own. ``factors``: the orders of the Hadamard matrices of the output's
    and the input's rotation (:func:`qhub_quip.hadamard.factor_of`). ``rescaled``: whether inputs are divided by
    scaleWH.
    Source: Tseng et al. 2024, algorithms 1 and 3; QuIP#'s lib/codebook, ``forward``.
    """
    kind = CODEBOOKS[name]
    scale = kind.residual_scale if residual_scale is None else residual_scale
    before = (Transform("divide", "in"),) if rescaled else ()
    return Codebook(
        out_features=out_features,
        in_features=in_features,
        nbits=kind.nbits,
        out_group=1,
        in_group=WIDTH,
        grid=Grid("block", out_features, in_features),
        shared=True,
        folded=tuple(SHIFT if bits == 16 else None for bits in kind.nbits),
        divisors=() if len(kind.nbits) == 1 or scale is None else (1.0, scale),
        transforms=(
            *before,
            Transform("scale", "in"),
            Transform("hadamard", "in", factors[1]),
            Transform("hadamard", "out", factors[0]),
            Transform("scale", "out"),
        ),
    )
