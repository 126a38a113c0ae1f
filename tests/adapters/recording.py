"""What the cells of the matrix gave, for the table in docs/adapters.md.

``QHUB_RECORD_ADAPTERS=FILE`` writes it; with ``QHUB_RECORD_ROWS`` or ``QHUB_RECORD_COLUMNS`` only these are run, and
what the file has already stays. ``python docs/adapters.py --record`` sets them, and makes the table of it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from .bases import BASES
from .cases import Case

__all__ = ["Record"]

PACKAGES = ("qhub-core", "torch", "transformers", "peft")


class Record:
    """Collects results: {row: {column: {check: "ok", or what is wrong}}}."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, dict[str, str]]] = {}
        self.tuners: dict[str, str] = {}

    def add(self, case: Case, column: str, results: dict[str, str]) -> None:
        """Note one cell."""
        self.tuners[case.name] = case.tuner
        self.rows.setdefault(case.name, {})[column] = results

    def write(self) -> None:
        """Write the file that the environment asks for, if it does."""
        wanted = os.environ.get("QHUB_RECORD_ADAPTERS")
        if not wanted:
            return
        file = Path(wanted)
        if os.environ.get("QHUB_RECORD_ROWS") or os.environ.get("QHUB_RECORD_COLUMNS"):
            before = json.loads(file.read_text(encoding="utf-8"))
            self.tuners = {**before["tuners"], **self.tuners}
            names = [*before["rows"], *(row for row in self.rows if row not in before["rows"])]
            self.rows = {row: _ordered({**before["rows"].get(row, {}), **self.rows.get(row, {})}) for row in names}
        result = {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
            "tuners": self.tuners,
            "rows": self.rows,
        }
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _ordered(cells: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return {column: cells[column] for column in BASES if column in cells}
