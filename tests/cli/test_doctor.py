"""``qhub doctor``: versions, settings, the way into transformers, plugins; one cause for each status."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import transformers

from qhub.cli import checks

SICK = """
from qhub import hookimpl
from qhub.reports import Finding

@hookimpl
def qhub_doctor():
    print("a library that talks")
    return [Finding("warning", "sick", "a fuse is blown", "replace it")]
"""


def found(data, subject):
    return [finding for finding in data["findings"] if finding["subject"] == subject]


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    names = ("QHUB_NATIVE", "QHUB_DISABLE", "QHUB_KERNEL", "QHUB_AUTOLOAD", "QHUB_ALLOW_PICKLE")
    for name in (*names, "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)


def test_healthy_machine(as_json, run):
    pytest.importorskip("pow2_quant")
    data = as_json("doctor")
    assert data["errors"] == 0
    (version,) = found(data, "torch")
    # Not torch.__version__: that names the build too (2.14.1+cu130), the package from PyPI does not.
    assert version["status"] == "ok" and importlib.metadata.version("torch") in version["message"]
    assert ">=" in version["message"]
    (version,) = found(data, "transformers")
    assert version["status"] == "ok" and transformers.__version__ in version["message"]
    assert len(found(data, "peft")) == 1 and not found(data, "pytest"), "of the extras, peft alone matters to a user"
    assert found(data, "cpu") and found(data, "kernels")[0]["message"].startswith("reference")
    assert found(data, "method pow2")[0]["status"] == "ok"
    shown = run("doctor")
    assert shown.exit_code == 0 and "errors: 0" in shown.stdout


def test_plugins_speak_for_themselves(as_json, install):
    install("sick", {"sick_plugin.py": SICK}, "[qhub.kernels]\nsick = sick_plugin\n")
    data = as_json("doctor")
    assert found(data, "sick") == [
        {"status": "warning", "subject": "sick", "message": "a fuse is blown", "remedy": "replace it"}
    ]


def test_broken_and_clashing_plugins_are_errors(as_json, run, install):
    install("bad", {"bad_plugin.py": "1/0"}, "[qhub.plugins]\nbad = bad_plugin\n")
    install("silly", {"silly_plugin.py": SICK.replace("return", "1/0 #")}, "[qhub.kernels]\nsilly = silly_plugin\n")
    install("one", {"one.py": ""}, "[qhub.plugins]\nboth = one\n")
    install("two", {}, "[qhub.plugins]\nboth = one\n")
    data = as_json("doctor", code=1)
    assert data["errors"] == 3
    assert "ZeroDivisionError" in found(data, "method bad")[0]["message"]
    assert "QHUB_DISABLE=bad" in found(data, "method bad")[0]["remedy"]
    (clash,) = found(data, "method both")
    assert clash["status"] == "error" and "one and two" in clash["message"]
    (failed,) = found(data, "plugin silly")
    assert failed["status"] == "error" and "qhub_doctor of the plugin 'silly' failed" in failed["message"]
    assert run("doctor").exit_code == 1


def test_a_requirement_that_is_not_met_is_an_error(as_json, install):
    entries = "[qhub.kernels]\nfast = fast_plugin\n"
    install("fast-kernels", {"fast_plugin.py": ""}, entries, requires="torch>=99")
    (first, second) = found(as_json("doctor", code=1), "torch")
    assert first["status"] == "ok" and second["status"] == "error"
    assert second["message"] == f"{importlib.metadata.version('torch')} is installed; fast-kernels needs >=99"
    assert second["remedy"] == "pip install 'torch>=99'"


def test_missing_torch_is_said_and_nothing_else_is_tried(monkeypatch):
    real_version, real_spec = importlib.metadata.version, importlib.util.find_spec

    def version(name):
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(checks, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real_spec(name))
    findings = checks.all_findings()
    assert [(f.subject, f.message[:13]) for f in findings if f.status == "error"] == [("torch", "not installed")]
    assert not any(finding.subject == "cpu" for finding in findings)


def test_the_other_qhub_is_named(as_json, install):
    install("qhub", {})
    (finding,) = found(as_json("doctor", code=1), "the package 'qhub'")
    assert finding["status"] == "error"
    assert "qhub 1.2 is installed: it is another team's product" in finding["message"]
    assert finding["remedy"].startswith("pip uninstall qhub")


@pytest.mark.parametrize(
    ("name", "value", "status", "message"),
    [
        ("QHUB_NATIVE", "pow2", "note", "left to transformers: pow2"),
        ("QHUB_NATIVE", "pow3", "warning", "names pow3, which no installed plugin"),
        ("QHUB_DISABLE", "pow3", "warning", "names pow3, which no installed plugin"),
        ("QHUB_KERNEL", "reference", "note", "forces reference"),
        ("QHUB_ALLOW_PICKLE", "1", "note", "read too"),
    ],
)
def test_settings(as_json, monkeypatch, name, value, status, message):
    monkeypatch.setenv(name, value)
    (finding,) = found(as_json("doctor"), name)
    assert finding["status"] == status and message in finding["message"] and finding["remedy"]


def test_a_forced_kernel_that_does_not_exist_is_an_error(as_json, monkeypatch):
    monkeypatch.setenv("QHUB_KERNEL", "warp")
    (finding,) = found(as_json("doctor", code=1), "QHUB_KERNEL")
    assert finding["status"] == "error" and "warp" in finding["message"]


@pytest.mark.parametrize(
    ("name", "value"), [("QHUB_AUTOLOAD", "0"), ("QHUB_AUTOLOAD", "off"), ("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")]
)
def test_automatic_loading_that_is_off(as_json, monkeypatch, name, value):
    assert found(as_json("doctor"), "automatic loading")[0]["status"] == "ok"
    monkeypatch.setenv(name, value)
    (finding,) = found(as_json("doctor"), "automatic loading")
    assert finding["status"] == "warning" and f"{name}={value}" in finding["message"]
