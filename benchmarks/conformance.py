"""Runs the conformance kit of every plugin in this repository and writes what it found, for the table in the README.

``python benchmarks/conformance.py`` writes ``benchmarks/results/conformance.json``: per method, the outcomes of each
test of the kit over all its configs; with date and versions.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "conformance.json"
PACKAGES = ("qhub-core", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface-hub")


def outcomes(report: Path) -> dict[str, dict[str, int]]:
    """Return {test function: {passed/failed/skipped: count}} of a JUnit report."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for case in ET.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[name][outcome] += 1
    return {name: dict(counts) for name, counts in sorted(found.items())}


def main() -> None:
    methods = {}
    for tests in sorted(ROOT.glob("plugins/*/tests/test_conformance.py")):
        package = tests.parents[1].name
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [
                sys.executable,
                "-m",
                "pytest",
                str(tests),
                f"--junitxml={report}",
                "-q",
                "-p",
                "no:cacheprovider",
            ]
            subprocess.run(command, cwd=ROOT, check=False)
            methods[package.removeprefix("qhub-")] = {
                "distribution": package,
                "version": version(package),
                "tests": outcomes(report),
            }
    result = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "methods": methods,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
