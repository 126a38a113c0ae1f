"""Few regular expressions that mean exactly the given names: ``targets`` where a class would mean too much."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

__all__ = ["expressions"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def expressions(names: Iterable[str]) -> list[str]:
    """Return ``re:`` expressions that match the ``names`` and nothing else.

    ``layers.0.q_proj`` and ``layers.1.q_proj`` become ``re:layers\\.(?:0|1)\\.q_proj$``; leaves of one parent with the
    same numbers are put together.
    """
    numbers: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for name in names:
        words = tuple(_NUMBER.split(name))
        numbers.setdefault(words, set()).add(tuple(_NUMBER.findall(name)))
    boxes: dict[tuple[tuple[tuple[str, ...], ...], str, tuple[str, ...]], list[str]] = {}
    for words, found in numbers.items():
        parent, _, leaf = words[-1].rpartition(".")
        for box in _boxes(found):
            boxes.setdefault((box, parent, words[:-1]), []).append(leaf)
    return [_written(words, box, parent, leaves) for (box, parent, words), leaves in boxes.items()]


def _boxes(found: set[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """Return products of sets of numbers that together are ``found``: one where that is a product itself."""
    axes = [sorted(set(axis), key=int) for axis in zip(*found, strict=True)]
    if len(found) == len(list(itertools.product(*axes))):
        return [tuple(map(tuple, axes))]
    # Where the first number decides what the others are, firsts with the same rest stay together.
    rests: dict[frozenset[tuple[str, ...]], list[str]] = {}
    for first in axes[0]:
        rest = frozenset(one[1:] for one in found if one[0] == first)
        rests.setdefault(rest, []).append(first)
    return [(tuple(firsts), *box) for rest, firsts in rests.items() for box in _boxes(set(rest))]


def _written(words: tuple[str, ...], box: tuple[tuple[str, ...], ...], parent: str, leaves: Sequence[str]) -> str:
    pieces = []
    for word, axis in zip(words, box, strict=True):
        pieces.append(re.escape(word) + (axis[0] if len(axis) == 1 else f"(?:{'|'.join(axis)})"))
    last = re.escape(leaves[0]) if len(leaves) == 1 else f"(?:{'|'.join(map(re.escape, leaves))})"
    lead = re.escape(f"{parent}.") if parent or words else ""
    return f"re:{''.join(pieces)}{lead}{last}$"
