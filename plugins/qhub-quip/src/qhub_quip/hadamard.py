"""The Hadamard matrices that QuIP# rotates with where a size is no power of two.

QuIP#'s code (``lib/utils/matmul_had.py``) takes them from Sloane's library of Hadamard matrices. They are made here by
the constructions that they are known to come from, as matrices of 1 and -1:

* orders 12, 20, 60, 108, 140: Paley's first construction, over the primes 11, 19, 59, 107, 139 (Paley 1933);
* orders 28, 36: Paley's second, over 13 and 17;
* orders 52, 116, 124, 156, 172: Williamson's (1944), from four symmetric circulant matrices each.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qhub.errors import ConfigError

__all__ = ["factor_of", "hadamard_matrix"]

# The first rows of the circulant matrices A, B, C, D, as Sloane's library has them (had.52.will and so on).
_WILLIAMSON = {
    52: ("+-+--++++--+-", "+---++++++---", "++-+--++--+-+", "+----+--+----"),
    116: (
        "++--+--+-+++-++++-+++-+--+--+",
        "++++-++-+---++++++---+-++-+++",
        "+-+---++--+-++++++-+--++---+-",
        "+++---++--+-+----+-+--++---++",
    ),
    124: (
        "+--+++-+--+----++----+--+-+++--",
        "+--+++-+--+----++----+--+-+++--",
        "+-----+++-+-+--++--+-+-+++-----",
        "++++++---+-+-++--++-+-+---+++++",
    ),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ),
}
_PALEY_FIRST = {prime + 1: prime for prime in (11, 19, 59, 107, 139)}
_PALEY_SECOND = {2 * (prime + 1): prime for prime in (13, 17)}
# QuIP#'s code tries them from the largest to the smallest (get_hadK): 60 * 2^n is never taken for 12 * 5 * 2^n.
_ORDERS = tuple(sorted((*_WILLIAMSON, *_PALEY_FIRST, *_PALEY_SECOND), reverse=True))


def factor_of(size: int, what: str) -> int:
    """Return the order q of the matrix that, times a power of two, makes a rotation of ``size``; 1 for a power of two.

    ``what``: whose size it is, for the message. Raises :class:`ConfigError` where QuIP# has no rotation of that size.
    """
    for order in (*_ORDERS, 1):
        if size % order == 0:
            rest = size // order
            if rest & (rest - 1) == 0:
                return order
            break
    raise ConfigError(
        f"{what} has a size of {size}: QuIP# rotates sizes that are a power of two, alone or times one of "
        f"{sorted(_ORDERS)}. List the module in modules_to_not_convert if the checkpoint stores it dense"
    )


@cache
def hadamard_matrix(order: int) -> Tensor:
    """Return QuIP#'s Hadamard matrix: (order, order) int8 of 1 and -1 on the CPU. All callers share the tensor."""
    # The device is named because transformers builds models with the meta device as the default.
    with torch.device("cpu"):
        if order in _PALEY_FIRST:
            return _paley_first(_PALEY_FIRST[order])
        if order in _PALEY_SECOND:
            return _paley_second(_PALEY_SECOND[order])
        return _williamson(_WILLIAMSON[order])


def _jacobsthal(prime: int) -> Tensor:
    """Return Q with Q[i, j] = 1 where i - j is a square modulo ``prime``, -1 where it is none, 0 where it is 0."""
    legendre = torch.full((prime,), -1, dtype=torch.int8)
    legendre[torch.arange(prime) ** 2 % prime] = 1
    legendre[0] = 0
    index = torch.arange(prime)
    return legendre[(index.unsqueeze(1) - index) % prime]


def _paley_first(prime: int) -> Tensor:
    """Return I + S, where S borders the antisymmetric Q of a prime that is 3 modulo 4: -1 above it, 1 beside it."""
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.int8)
    matrix[0, 1:] = -1
    matrix[1:, 1:] = _jacobsthal(prime) + torch.eye(prime, dtype=torch.int8)
    return matrix


def _paley_second(prime: int) -> Tensor:
    """Return [[C + I, C - I], [C - I, -C - I]], C bordering the symmetric Q of a prime that is 1 modulo 4 with 1."""
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(prime)
    one = torch.eye(prime + 1, dtype=torch.int8)
    upper = torch.cat([conference + one, conference - one], dim=1)
    return torch.cat([upper, torch.cat([conference - one, -conference - one], dim=1)])


def _williamson(rows: tuple[str, ...]) -> Tensor:
    a, b, c, d = (_circulant(row) for row in rows)
    array = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(blocks, dim=1) for blocks in array])


def _circulant(row: str) -> Tensor:
    first = torch.tensor([1 if sign == "+" else -1 for sign in row], dtype=torch.int8)
    return torch.stack([first.roll(shift) for shift in range(len(row))])
