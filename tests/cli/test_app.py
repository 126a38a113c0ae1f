"""The application: help without torch, versions, plugins' commands, errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import qhub
from qhub.errors import UnknownMethodError

GREETER = """
from qhub import hookimpl

@hookimpl
def qhub_commands(app):
    @app.command()
    def greet(name: str) -> None:
        "Greet somebody."
        print(f"hello {name}")

    @app.command("list")
    def other_list() -> None:
        print("not the real one")
"""
COMMANDS = ("list", "doctor", "quantize", "inspect", "eval", "explain", "new-plugin")
MARKED = "import pathlib; pathlib.Path(__file__).with_name('imported').touch()\n"


def test_help_needs_neither_torch_nor_transformers():
    script = (
        "import sys; sys.argv = ['qhub', '--help']\n"
        "from qhub.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f" {command} " in done.stdout


def test_help_fits_a_terminal_and_has_examples(run):
    for command in COMMANDS:
        shown = run(command, "--help").stdout
        assert f"qhub {command} " in shown.split("Examples:")[1]
        assert all(len(line) <= 80 for line in shown.splitlines())


def test_version(run):
    assert run("--version").stdout == f"qhub {qhub.__version__}\n"


@pytest.mark.parametrize("arguments", [["nosuch"], ["inspect"], ["list", "--nosuch"], ["eval", "m", "--windows", "0"]])
def test_wrong_usage_is_2_and_silent_on_stdout(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and "Error" in result.stderr


def test_plugins_add_commands(run, install):
    install("greeter", {"greeter.py": GREETER}, "[qhub.plugins]\ngreeting = greeter\n")
    done = run("greet", "you")
    assert (done.exit_code, done.stdout) == (0, "hello you\n")
    shown = run("--help")
    assert "Greet somebody." in shown.stdout
    assert "warning: the plugin 'greeting' brings a command 'list', a name that is taken: left out" in shown.stderr
    assert "not the real one" not in run("list").stdout


def test_a_broken_plugin_does_not_take_the_others_down(run, install):
    install("broken", {"broken.py": "1/0  # qhub_commands"}, "[qhub.plugins]\nbroken = broken\n")
    install("greeter", {"greeter.py": GREETER}, "[qhub.plugins]\ngreeting = greeter\n")
    done = run("greet", "you")
    assert (done.exit_code, done.stdout) == (0, "hello you\n")
    assert "warning: qhub goes on without the plugin 'broken'" in done.stderr


@pytest.mark.parametrize("target", ["quiet", "quiet_package.inner", "quiet_folder.inner"])
def test_a_plugin_without_commands_is_not_imported_for_help(run, install, target):
    modules = {f"{target.replace('.', '/')}{'/__init__' if 'folder' in target else ''}.py": MARKED}
    if "." in target:
        modules[f"{target.partition('.')[0]}/__init__.py"] = MARKED
    site = install("quiet", modules, f"[qhub.plugins]\nquiet = {target}\n")
    assert run("--help").exit_code == 0
    assert not list(site.rglob("imported"))
    run("list", "--abilities")
    assert list(site.rglob("imported")), "it is imported when it is asked for"


def test_errors_are_one_line(run, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "nosuch"}}')
    done = run("inspect", tmp_path, "--json")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: this checkpoint is quantized with 'nosuch'") and "pip install qhub-nosuch" in line
    assert json.loads(done.stdout)["error"] == {"type": "UnknownMethodError", "message": line.removeprefix("error: ")}
    monkeypatch.setenv("QHUB_TRACEBACK", "1")
    with pytest.raises(UnknownMethodError):
        run("inspect", tmp_path)


def test_a_process_of_its_own(process, tmp_path):
    done = process("inspect", tmp_path / "nowhere", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no folder" in done.stderr and "Traceback" not in done.stderr
