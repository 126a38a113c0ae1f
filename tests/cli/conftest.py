"""Fixtures of the command line's tests: a runner, a quantized model, packages installed for one test."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers import auto
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run(pow2: str) -> Callable[..., Any]:
    """A function that runs a command in this process and returns its exit code, stdout and stderr."""

    # Before click 8.2 the runner mixes both streams unless told.
    apart: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}

    def command(*arguments: Any) -> Any:
        from qhub.cli.app import app

        return CliRunner(**apart).invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    return command


@pytest.fixture(scope="session")
def said() -> Callable[[Any], str]:
    """A function that returns a result's stderr without the frame that usage errors are printed in."""
    return lambda result: " ".join(result.stderr.replace("│", " ").split())


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
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A function that installs a distribution for this test, and for a process with the returned folder on its path."""
    from qhub.integrations.transformers import register
    from qhub.registry import registry

    loaded, modules = dict(registry._loaded), set(sys.modules)
    monkeypatch.setattr(register, "_joined", set(register._joined))
    for table in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        monkeypatch.setattr(auto, table, dict(getattr(auto, table)))

    def make(name: str, modules: dict[str, str], entries: str = "", requires: str = "") -> Path:
        site = tmp_path / "site"
        info = site / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        wanted = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\nSummary: About {name}\n{wanted}"
        )
        (info / "entry_points.txt").write_text(entries)
        for file, source in modules.items():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_text(source)
        monkeypatch.syspath_prepend(site)
        registry.refresh()
        return site

    yield make
    for group, name in set(registry._loaded) - set(loaded):
        registry.unregister(name, group)
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    monkeypatch.undo()
    registry.refresh()


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the command line in a process of its own, with ``site`` on its path."""

    def command(*arguments: Any, site: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH", "")]))
        settings = {name: value for name, value in os.environ.items() if not name.startswith("QHUB_")}
        return subprocess.run(
            [sys.executable, "-m", "qhub", *map(str, arguments)],
            env={**settings, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return command
