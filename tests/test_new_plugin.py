"""`qhub new-plugin`: what it writes passes its own tests as it is, and it overwrites nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qhub.cli.app import app as whole
from qhub.cli.new_plugin import new_plugin, write_plugin
from qhub.errors import PluginError
from qhub.testing.environment import FreshEnvironment

ROOT = Path(__file__).resolve().parents[1]

app = typer.Typer()
app.command()(new_plugin)


def test_generated_plugin_passes_its_own_tests(tmp_path):
    """Generated, installed into a fresh environment, and its conformance tests run there."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs pip and hatchling: pip install qhub-core[dev]")
    project = write_plugin("half_done", tmp_path)
    assert project == tmp_path / "qhub-half-done"
    environment = FreshEnvironment(tmp_path / "env")
    environment.install(project)
    said = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project)
    last = said.strip().splitlines()[-1]
    assert " passed" in last and "failed" not in last
    assert int(last.split(" passed")[0].split()[-1]) > 100


def test_files_and_placeholders(tmp_path):
    project = write_plugin("my_method2", tmp_path / "new" / "place")
    files = {str(file.relative_to(project)) for file in project.rglob("*") if file.is_file()}
    sources = {f"src/qhub_my_method2/{name}.py" for name in ("__init__", "config", "method", "format")}
    assert files == sources | {"pyproject.toml", "README.md", "tests/test_conformance.py"}
    for file in files:
        text = (project / file).read_text()
        assert "{{" not in text, file
        assert not file.endswith(".py") or compile(text, file, "exec")
        assert max(map(len, text.splitlines())) <= 120, file
    assert "class MyMethod2Config" in (project / "src/qhub_my_method2/config.py").read_text()
    assert 'my_method2 = "qhub_my_method2"' in (project / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "name", ["", "My", "2bit", "a-b", "a__b", "_a", "a_", "a.b", "../a", "a/b", "über", "a b", "core"]
)
def test_invalid_names_are_refused(name, tmp_path):
    with pytest.raises(PluginError, match="cannot be a method's name"):
        write_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "qhub-mine").mkdir()
    (tmp_path / "qhub-mine" / "notes").write_text("mine")
    with pytest.raises(PluginError, match=r"qhub-mine exists already"):
        write_plugin("mine", tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["qhub-mine"]
    assert (tmp_path / "qhub-mine" / "notes").read_text() == "mine"


def test_name_of_an_installed_method_is_refused(tmp_path, pow2):
    with pytest.raises(PluginError, match=r"'pow2' is served by"):
        write_plugin(pow2, tmp_path)


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qhub.cli.new_plugin._fill", full)
    with pytest.raises(OSError, match="No space"):
        write_plugin("mine", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["mine", "--dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "pip install -e" in done.stdout and "src/qhub_mine/method.py" in done.stdout
    again = runner.invoke(app, ["mine", "--dir", str(tmp_path)])
    assert again.exit_code == 2
    # The message stands in a box that is as wide as the terminal.
    assert "existsalready" in re.sub(r"[│\s]", "", again.output)
    # rich would take [test] for markup.
    assert 'pip install -e ".[test]"' in CliRunner().invoke(whole, ["new-plugin", "--help"]).output
    as_json = runner.invoke(app, ["other", "--dir", str(tmp_path), "--json"])
    assert json.loads(as_json.stdout)["files"][0] == "README.md"


def test_wheel_contains_the_template(tmp_path):
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs pip and hatchling: pip install qhub-core[dev]")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("qhub_core-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    template = ROOT / "qhub" / "cli" / "template"
    expected = {str(file.relative_to(ROOT)) for file in template.rglob("*.tmpl")}
    assert len(expected) == 7
    assert expected <= packed
