"""Fixtures of the command line's tests: a runner, a quantized model, and packages that are installed for one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run(pow2: str) -> Callable[..., Any]:
    """A function that runs a command in this process and returns its exit code, stdout and stderr."""

    def command(*arguments: Any) -> Any:
        from qhub.cli.app import app

        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return command


@pytest.fixture(scope="session")
def as_json(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs a command with ``--json`` and returns what it printed, exit code ``code``."""

    def command(*arguments: Any, code: int = 0) -> Any:
        result = run(*arguments, "--json")
        assert result.exit_code == code, result.stderr
        return json.loads(result.stdout)

    return command


@pytest.fixture(scope="session")
def quantized(run: Callable[..., Any], doclm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, quantized by the command line with the example method."""
    out = tmp_path_factory.mktemp("cli") / "doclm-pow2"
    result = run("quantize", doclm, "--method", "pow2", "--out", out)
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a distribution which a process with the folder on its path finds installed."""

    def make(name: str, modules: dict[str, str], entries: str = "", requires: str = "") -> Path:
        site = tmp_path / "site"
        info = site / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        wanted = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\nSummary: About {name}\n{wanted}")
        (info / "entry_points.txt").write_text(entries)
        for file, source in modules.items():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_text(source)
        return site

    return make


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the command line in a process of its own, with ``site`` on its path."""

    def command(*arguments: Any, site: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH", "")]))
        settings = {name: value for name, value in os.environ.items() if not name.startswith("QHUB_")}
        return subprocess.run(
            [sys.executable, "-m", "qhub.cli", *map(str, arguments)],
            env={**settings, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return command
