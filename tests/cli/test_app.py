"""The application: help without torch, versions, plugins' commands, errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import qhub

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
    for command in ("list", "doctor", "quantize", "inspect", "eval", "explain"):
        assert f" {command} " in done.stdout


def test_help_fits_a_terminal_and_has_examples(run):
    for command in ("list", "doctor", "quantize", "inspect", "eval", "explain"):
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


def test_plugins_add_commands(process, install):
    site = install("greeter", {"greeter.py": GREETER}, "[qhub.plugins]\ngreeting = greeter\n")
    done = process("greet", "you", site=site)
    assert (done.returncode, done.stdout) == (0, "hello you\n")
    shown = process("--help", site=site)
    assert "Greet somebody." in shown.stdout
    assert "warning: the plugin 'greeting' brings a command 'list', a name that is taken: left out" in shown.stderr
    assert "not the real one" not in process("list", site=site).stdout


def test_a_broken_plugin_does_not_take_the_others_down(process, install):
    install("broken", {"broken.py": "1/0  # qhub_commands"}, "[qhub.kernels]\nbroken = broken\n")
    site = install("greeter", {"greeter.py": GREETER}, "[qhub.plugins]\ngreeting = greeter\n")
    done = process("greet", "you", site=site)
    assert (done.returncode, done.stdout) == (0, "hello you\n")
    assert "warning: qhub goes on without the plugin 'broken'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("target", ["quiet", "quiet_package.inner", "quiet_folder.inner"])
def test_a_plugin_without_commands_is_not_imported_for_help(process, install, target):
    modules = {f"{target.replace('.', '/')}{'/__init__' if 'folder' in target else ''}.py": MARKED}
    if "." in target:
        modules[f"{target.partition('.')[0]}/__init__.py"] = MARKED
    site = install("quiet", modules, f"[qhub.plugins]\nquiet = {target}\n")
    assert process("--help", site=site).returncode == 0
    assert not list(site.rglob("imported"))
    assert process("list", "--abilities", site=site).returncode == 1, "it is imported when it is asked for"
    assert list(site.rglob("imported"))


def test_errors_are_one_line(process, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "nosuch"}}')
    done = process("inspect", tmp_path, "--json")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: this checkpoint is quantized with 'nosuch'") and "pip install qhub-nosuch" in line
    assert json.loads(done.stdout)["error"] == {"type": "UnknownMethodError", "message": line.removeprefix("error: ")}
    traced = process("inspect", tmp_path, QHUB_TRACEBACK="1")
    assert traced.returncode == 1 and traced.stdout == "" and "Traceback" in traced.stderr
