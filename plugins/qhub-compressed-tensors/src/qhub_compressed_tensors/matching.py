"""Which group of a config a module belongs to.

A pattern is a module's whole name, ``re:`` and a regular expression that matches from the name's start, or the name of
a class. Of several groups whose targets match, names go before expressions and these before classes; among equals the
first in the order of upstream's sorting. What ``ignore`` matches belongs to none.
Source: compressed-tensors 0.20, ``match_targets`` and ``is_match`` (compressed_tensors/utils/match.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

from qhub.plan import WeightInfo
from qhub_compressed_tensors.scheme import Scheme

__all__ = ["CLASSES", "EMBEDDING", "matching_pattern", "names_of", "scheme_for"]

# torch's own classes of a linear layer and its bases; fused experts stand for as many linear layers.
CLASSES = ("Linear", "Module")
EMBEDDING = ("Embedding", "Module")


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return _expression(pattern[3:]).match(module) is not None
    return pattern == module


def names_of(weight: WeightInfo) -> tuple[str, ...]:
    """Return the names that a config may have for the module of ``weight``: the file's, and the model's."""
    return tuple(dict.fromkeys(name for name in (weight.stored, weight.module) if name))


def matching_pattern(module: str, patterns: Iterable[str], classes: Sequence[str] = CLASSES) -> str | None:
    """Return the first of ``patterns`` that means ``module``, of one of ``classes``; None if none does."""
    return next((one for one in patterns if _names(one, module) or one in classes), None)


def scheme_for(module: str, schemes: Sequence[Scheme], classes: Sequence[str] = CLASSES) -> Scheme | None:
    """Return the scheme of ``module``; None if no target means it. ``ignore`` is not looked at."""
    by_target = {target: scheme for scheme in schemes for target in scheme.targets}
    ordered = sorted(by_target, key=lambda target: ("re:" in target, target))
    found = next((target for target in ordered if _names(target, module)), None)
    if found is None:
        found = next((target for target in ordered if target in classes), None)
    return None if found is None else by_target[found]
