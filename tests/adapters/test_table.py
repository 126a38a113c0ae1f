"""The table in docs/adapters.md is that of the committed results, and those are of the matrix as it is."""

from __future__ import annotations

import json
import subprocess
import sys

from .bases import BASES, ROOT
from .matrix import CASES, cells


def test_the_page_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "adapters.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_results_are_of_this_matrix() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "adapters.json").read_text(encoding="utf-8"))
    recorded = {(row, column) for row, columns in result["rows"].items() for column in columns}
    expected = {(case.name, column) for case, column in cells()}
    assert recorded == expected, (
        f"recorded and not in the matrix: {sorted(recorded - expected)}; in the matrix and not recorded: "
        f"{sorted(expected - recorded)}: run `python docs/adapters.py --record`"
    )
    assert set(result["rows"]) == {case.name for case in CASES}
    assert {column for columns in result["rows"].values() for column in columns} == set(BASES)
    failed = [
        (row, column, check)
        for row, columns in result["rows"].items()
        for column, results in columns.items()
        for check, outcome in results.items()
        if outcome.startswith("fails")
    ]
    assert not failed, f"recorded as failing: {failed}"
