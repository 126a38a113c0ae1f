"""Writes the table of docs/adapters.md from what the tests of adapters recorded.

``python docs/adapters.py`` writes it, ``--check`` fails if it is stale. ``--record`` runs every cell of the matrix
first (the slow ones too: a quarter of an hour) and writes ``benchmarks/results/adapters.json``; with names of rows
behind it, only these are run. It needs the packages that peft asks for in some rows: scikit-learn and attrs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adapters.md"
RESULT = ROOT / "benchmarks" / "results" / "adapters.json"
TESTS = "tests/adapters/test_matrix.py"
BLOCK = re.compile(r"(<!-- table: adapters \(python docs/adapters.py\) -->\n).*?(<!-- end table -->)", re.DOTALL)

PEFT = "peft itself: "
CANNOT = "cannot: "
# Checks that say one thing together; what is left of a name is what it is called in a note.
TOGETHER = {"merging": "merging", "unloading": "merging", "unloading safely": "merging"}


def record(rows: list[str]) -> None:
    """Run the matrix, or some ``rows`` of it (columns are given as ``column=NAME``), and keep what it gives."""
    columns = [row.removeprefix("column=") for row in rows if row.startswith("column=")]
    rows = [row for row in rows if not row.startswith("column=")]
    environment = {
        **os.environ,
        "QHUB_RECORD_ADAPTERS": str(RESULT),
        "QHUB_RECORD_ROWS": "\n".join(rows),
        "QHUB_RECORD_COLUMNS": "\n".join(columns),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", TESTS, "-q", "-p", "no:cacheprovider"]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        raise SystemExit("a cell fails: see above")


# What PEFT's errors come to, where they do not say it themselves.
PLAINLY = {
    "has no attribute 'merge": "there is nothing to merge",
    "switching to another adapter and back changes": "a second adapter changes the base once more",
    "with it disabled": "the model without its adapter is not the base",
    "loading the adapter changes the logits": "the start is not the same again when it is loaded",
    "logits after loading": "the start is not the same again when it is loaded",
    "merged: off by": "layers that share a weight are merged into it one after the other",
    "does not support safe merging": "",
    "No supported layers found": "the start cannot be made again under a first adapter",
    "`eigens` attribute not found": "the start needs its data again",
    "NotImplementedError": "not implemented",
    "has no attribute 'target_modules'": "one adapter only",
}


def plain(wrong: str) -> str:
    """Return what a result says, in short."""
    text = wrong.removeprefix(PEFT).removeprefix(CANNOT).rstrip(".").replace("|", "\\|")
    return next((short for part, short in PLAINLY.items() if part in text), text)


def notes_of(results: dict[str, str]) -> dict[str, list[str]]:
    """Return {what is wrong: the checks that say so} of one cell."""
    found: dict[str, list[str]] = {}
    for check, result in results.items():
        if result != "ok" and plain(result):
            names = found.setdefault((PEFT if result.startswith(PEFT) else "") + plain(result), [])
            name = TOGETHER.get(check, check)
            if name not in names:
                names.append(name)
    return found


def cell(results: dict[str, str] | None) -> str:
    """Return what stands in the table for one cell: what peft cannot do itself is no fault of the method."""
    if results is None:
        return "–"
    own = [result for result in results.values() if result != "ok" and not result.startswith(PEFT)]
    if not own:
        return "ok"
    return "no" if len(own) == len(results) else "partial"


def sentence(wrong: str, checks: list[str]) -> str:
    """Return a note: the checks, and what is wrong with them."""
    return f"{', '.join(checks)}: {wrong.removeprefix(PEFT)}"


def table(result: dict[str, Any]) -> str:
    """Return the table, and under it what is wrong with cells that are not ok."""
    columns = list(dict.fromkeys(column for row in result["rows"].values() for column in row))
    lines = [
        "| tuner | " + " | ".join(columns) + " | peft itself cannot |",
        "|" + "---|" * (len(columns) + 2),
    ]
    notes: list[str] = []
    for row, cells in result["rows"].items():
        theirs: dict[str, None] = {}
        ours: dict[str, list[str]] = {}
        for column, results in cells.items():
            for wrong, checks in notes_of(results).items():
                if wrong.startswith(PEFT):
                    theirs[sentence(wrong, checks)] = None
                else:
                    ours.setdefault(sentence(wrong, checks), []).append(column)
        for wrong, where in ours.items():
            notes.append(f"- {row} on {'every method' if where == list(cells) else ', '.join(where)}: {wrong}")
        marks = [cell(cells.get(column)) for column in columns]
        lines.append(f"| {row} | " + " | ".join(marks) + f" | {'; '.join(theirs)} |")
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    count = sum(len(results) for row in result["rows"].values() for results in row.values())
    footer = f"{count} checks on {result['date']}: Python {result['python']}, {versions}; CPU only."
    return "\n".join([*lines, "", *([*notes, ""] if notes else []), footer])


def render() -> str:
    """Return the page with its table filled from the committed results."""
    text = PAGE.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise SystemExit("docs/adapters.md has no block for the table")
    made = table(json.loads(RESULT.read_text(encoding="utf-8")))
    return BLOCK.sub(lambda found: f"{found[1]}{made}\n{found[2]}", text)


def main() -> None:
    if sys.argv[1:2] == ["--record"]:
        record(sys.argv[2:])
    after = render()
    if "--check" not in sys.argv:
        PAGE.write_text(after, encoding="utf-8")
    elif after != PAGE.read_text(encoding="utf-8"):
        raise SystemExit("docs/adapters.md is stale: run `python docs/adapters.py`")


if __name__ == "__main__":
    main()
