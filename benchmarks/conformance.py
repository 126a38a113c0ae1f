"""Runs the conformance kit of every plugin in this repository and writes what it found, for the table in the README.

``python benchmarks/conformance.py`` writes ``benchmarks/results/conformance.json``: per method, the outcomes of each
test of the kit over all its configs; with date and versions.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

from qhub.testing import MethodConformance

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "conformance.json"
PACKAGES = ("qhub-core", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface-hub")


def methods_of(tests: Path) -> dict[str, str]:
    """Return {test class: the method it tests} of a plugin's conformance tests."""
    spec = importlib.util.spec_from_file_location(f"conformance_of_{tests.parents[1].name}", tests)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        name: found.method
        for name, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, MethodConformance) and found.method
    }


def outcomes(report: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Return {test class, or "" outside of one: {test function: {passed/failed/skipped: count}}} of a JUnit report."""
    found: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for case in ET.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        owner = case.get("classname", "").rpartition(".")[2]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[owner if owner.startswith("Test") else ""][name][outcome] += 1
    return {owner: {name: dict(c) for name, c in sorted(tests.items())} for owner, tests in found.items()}


def main() -> None:
    methods = {}
    for tests in sorted(ROOT.glob("plugins/*/tests/test_conformance.py")):
        package = tests.parents[1].name
        # What a plugin damages itself, because its files are no safetensors.
        own = [file for file in (tests.with_name("test_hostile_files.py"),) if file.is_file()]
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", *map(str, (tests, *own)), f"--junitxml={report}", "-q"]
            subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, check=False)
            found = outcomes(report)
        hostile: Counter[str] = Counter()
        for counts in found.pop("", {}).values():
            hostile.update(counts)
        for owner, method in methods_of(tests).items():
            results = dict(found.get(owner, {}))
            if own:
                results["test_hostile_files"] = dict(hostile)
            methods[method] = {"distribution": package, "version": version(package), "tests": results}
    methods = dict(sorted(methods.items()))
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
