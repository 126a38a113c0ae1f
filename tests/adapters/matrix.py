"""The whole matrix: its rows, its columns, and how a cell is run.

What fails on a quantized model is tried on a dense one too: what peft cannot do there, it need not do here. All else
that fails is a failure, unless :data:`REASONS` says why it cannot work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from .bases import BASES, Bases
from .cases import Case
from .cell import CHECKS, Cell, UntestedError
from .elsewhere import OTHER_CASES
from .prompts import PROMPT_TUNERS
from .recording import Record
from .tuners import WEIGHT_TUNERS

__all__ = ["CASES", "COLUMNS", "ROWS", "Matrix", "cells", "is_slow"]

CASES = [*WEIGHT_TUNERS, *PROMPT_TUNERS, *OTHER_CASES]
# By default all rows are run on these columns, and these rows on all columns but the codebooks, whose search takes its
# time: there only the quick ones. The other cells are slow tests.
COLUMNS = ("bitsandbytes NF4", "gptq 4-bit act-order")
ROWS = ("LoRA", "LoRA, DoRA", "LoRA, PiSSA", "AdaLoRA", "IA3", "LoHa", "OFT", "SHiRA", "Fused experts: LoRA")
_ON_A_LATTICE = (
    "from its target, while codes picked on the old grid",
    "on a rotated lattice the merged weight is up to 0.3 % of the rounding error, or 0.001 of the weight, farther from "
    "its target than codes picked under the old scale; the cause is not found",
)
# {row: {check, or "all": (how it fails, the reason)}}, on every quantized base; a cell that works is recorded as such.
REASONS: dict[str, dict[str, tuple[str, str]]] = {
    "LoRA, KaSA": {
        "switching": (
            "switching to another adapter and back changes the logits",
            "each new adapter cuts the smallest singular values out of the base weights again; requantized, they are "
            "of full rank once more, so the second cut moves them by about as much as rounding does",
        )
    },
    **{name: {"unloading": _ON_A_LATTICE} for name in ("Supertuning", "Supertuning, Supra")},
    "LoRA, LoRA-GA": dict.fromkeys(
        ("forward", "training"),
        (
            "from its target",
            "the start is cut out of gradients, and a method that rounds activations gets slightly other ones than the "
            "dense model: it starts as well, elsewhere",
        ),
    ),
}
# What peft cannot do on a dense model either; anything else that fails there is a mistake of the case.
MERGING = ("merging", "unloading", "unloading safely")
LACKS: dict[str, tuple[str, ...]] = {
    "LoRA, PiSSA": ("switching", "disabling"),
    "LoRA, PiSSA fast": ("saving", "switching", "disabling"),
    "LoRA, OLoRA": ("switching", "disabling"),
    "LoRA, CorDA": ("saving", "switching", "disabling"),
    "LoRA, LoRA-GA": ("saving", "switching", "disabling"),
    "LoRA, KaSA": ("switching", "disabling"),
    "LoRA, layers repeated": ("switching", "disabling", *MERGING),
    "LoRA, aLoRA": MERGING,
    "LoRA, biases of its own": MERGING,
    "LoRA, biases trained": ("switching",),
    "AdaLoRA": ("switching",),
    "BEFT": MERGING,
    "LILY": MERGING,
    "OSF": ("merging",),
    "Poly": MERGING,
    "SHADOW": MERGING,
    "X-LoRA": ("saving", "switching"),
    "OPT: LoRA, biases trained": ("switching", "disabling"),
    **{case.name: MERGING for case in PROMPT_TUNERS},
}

_QUICK = ("LoRA", "IA3", "Prompt tuning")


def is_slow(case: Case, column: str) -> bool:
    """Return whether a cell is left out by default."""
    if isinstance(BASES[column], Path):
        return case.name not in _QUICK
    return column not in COLUMNS and case.name not in ROWS


def cells() -> list[tuple[Case, str]]:
    """Return row and column of every cell."""
    return [
        (case, column)
        for case in CASES
        for column, values in BASES.items()
        if case.architecture == "llama" or not (isinstance(values, Path) or _lacks(values, case.architecture))
    ]


def _lacks(values: Mapping[str, Any], architecture: str) -> bool:
    """Return whether a method has no such models: GGUF has no names for OPT's tensors."""
    return values["quant_method"] == "gguf" and architecture == "opt"


class Matrix:
    """Runs cells, and keeps what they gave."""

    def __init__(self, bases: Bases, record: Record, factory: pytest.TempPathFactory) -> None:
        self.bases = bases
        self.record = record
        self._factory = factory
        self._dense: dict[tuple[str, str], str | None] = {}

    def run(self, case: Case, column: str) -> None:
        """Run all checks of a cell; raise if one fails that should not."""
        make, twin = self._makers(case, column)
        cell = Cell(case, make, twin, self._factory.mktemp("cell"))
        results: dict[str, str] = {}
        failures: list[Exception] = []
        for name, check in CHECKS.items():
            try:
                check(cell)
                results[name] = "ok"
            except Exception as error:
                results[name] = self._judged(case, name, error)
                if results[name].startswith("fails"):
                    failures.append(error)
        self.record.add(case, column, results)
        if failures:
            wrong = {name: result for name, result in results.items() if result.startswith("fails")}
            raise AssertionError(f"{case} on {column}: {wrong}") from failures[0]

    def _makers(self, case: Case, column: str) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
        return (
            lambda: self.bases.quantized(column, case.architecture),
            lambda: self.bases.twin(column, case.architecture),
        )

    def _judged(self, case: Case, check: str, error: Exception) -> str:
        if check in LACKS.get(case.name, ()) and not isinstance(error, UntestedError):
            dense = self._on_dense(case, check)
            if dense is not None:
                return f"peft itself: {dense}"
        reasons = REASONS.get(case.name, {})
        part, reason = reasons.get(check) or reasons.get("all") or (None, "")
        if part is not None and part in str(error):
            return f"cannot: {reason}"
        return f"fails: {_first_line(error)}"

    def _on_dense(self, case: Case, check: str) -> str | None:
        """Return why a check fails on a dense model; None where it passes."""
        key = (case.name, check)
        if key not in self._dense:
            twin = self._makers(case, COLUMNS[0])[1]
            try:
                CHECKS[check](Cell(case, twin, twin, self._factory.mktemp("dense")))
                self._dense[key] = None
            except Exception as error:
                self._dense[key] = _first_line(error)
        return self._dense[key]


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
