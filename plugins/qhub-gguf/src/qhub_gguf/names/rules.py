"""Rules: one line per kind of tensor, with ``{i}`` for the number of the layer, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from qhub_gguf.names.entry import PLAIN, Recipe

__all__ = ["Family", "Rule", "rules"]

BOTH = (".weight", ".bias")


@dataclass(frozen=True, eq=False)
class Rule:
    """Says that the file's ``ggml`` + suffix is the model's ``hf`` + suffix.

    ``suffixes``: pairs (file, model) that the names may end with.
    """

    ggml: str
    hf: str
    recipe: Recipe = PLAIN
    suffixes: tuple[tuple[str, str], ...] = ((".weight", ".weight"), (".bias", ".bias"))


@dataclass(frozen=True, eq=False)
class Family:
    """Is what an architecture's tensors are called. Later rules win over earlier ones.

    ``ignored``: patterns of the file's tensors that no parameter holds (they belong to the config); ``computed``:
    patterns of parameters and buffers that no file stores, because they are tied to or computed from others.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = (
        r"(blk\.\d+\.)?rope_freqs\.weight",
        r"(blk\.\d+\.)?rope_factors_(long|short)\.weight",
        r"blk\.\d+\.attn_rot_embd\.weight",
    )
    computed: tuple[str, ...] = (r".*rotary_emb\..*",)
    extra: dict[str, str] = field(default_factory=dict)


def rules(
    table: Iterable[tuple[str, str]], recipe: Recipe = PLAIN, suffixes: str | tuple[str, str] = "both"
) -> list[Rule]:
    """Make rules of (file, model) names that share a recipe; ``suffixes``: "both" (.weight and .bias), "weight", "none"
    (the names are whole), or one pair."""
    pairs = {
        "both": ((".weight", ".weight"), (".bias", ".bias")),
        "weight": ((".weight", ".weight"),),
        "bias": ((".bias", ".bias"),),
        "none": (("", ""),),
    }
    chosen = pairs[suffixes] if isinstance(suffixes, str) else (suffixes,)
    return [Rule(ggml, hf, recipe, chosen) for ggml, hf in table]


def pattern(template: str) -> re.Pattern[str]:
    """Return the regular expression of a template with ``{i}`` (and ``{j}``) for numbers."""
    escaped = re.escape(template)
    for letter in "ij":
        escaped = escaped.replace(rf"\{{{letter}\}}", rf"(?P<{letter}>\d+)")
    return re.compile(escaped)
