"""Every tuner of the installed peft on every method: forward, training, saving, switching, disabling, merging."""

from __future__ import annotations

import importlib.util
import os

import pytest

from .cases import Case
from .matrix import Matrix, cells, is_slow

# Rows and columns that are recorded anew, one a line; none: all.
_WANTED = os.environ.get("QHUB_RECORD_ROWS", "").splitlines()
_COLUMNS = os.environ.get("QHUB_RECORD_COLUMNS", "").splitlines()


def _parameters() -> list[object]:
    return [
        pytest.param(
            case,
            column,
            id=f"{case}-{column}".replace(" ", "_"),
            marks=(pytest.mark.slow,) if is_slow(case, column) else (),
        )
        for case, column in cells()
        if (not _WANTED or case.name in _WANTED) and (not _COLUMNS or column in _COLUMNS)
    ]


@pytest.mark.parametrize(("case", "column"), _parameters())
def test_cell(case: Case, column: str, matrix: Matrix) -> None:
    if case.needs is not None and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"peft asks for {case.needs} here, which is not installed")
    matrix.run(case, column)
