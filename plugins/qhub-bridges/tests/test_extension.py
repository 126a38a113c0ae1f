"""gptqmodel's extensions are used where they have been compiled; the compiler is started for who names the kernel."""

from __future__ import annotations

import importlib.util
import sys
import types
from types import SimpleNamespace

import pytest
from qhub_bridges.extension import missing


@pytest.fixture
def gptqmodel(monkeypatch, tmp_path):
    """A gptqmodel with one extension; what is loaded is in ``loaded``."""
    held = SimpleNamespace(_ops_available=lambda: False, base_build_root=lambda: tmp_path)
    extension = types.ModuleType("gptqmodel.extension")
    extension._EXTENSION_SPECS_BY_NAME = {"marlin_bf16": SimpleNamespace(resolve=lambda: held)}
    extension.loaded = []
    extension.load = lambda name: extension.loaded.append(name) or {name: True}
    extension.error = lambda name: "nvcc is too old"
    package = types.ModuleType("gptqmodel")
    package.extension = extension
    package.__spec__ = importlib.util.spec_from_loader("gptqmodel", loader=None)
    monkeypatch.setitem(sys.modules, "gptqmodel", package)
    monkeypatch.setitem(sys.modules, "gptqmodel.extension", extension)
    monkeypatch.delenv("QHUB_KERNEL", raising=False)
    return extension


def test_nothing_compiled_is_compiled_for_who_asks(gptqmodel, monkeypatch):
    assert "has not compiled it here: QHUB_KERNEL=marlin makes it" in missing("marlin", "marlin_bf16")
    assert not gptqmodel.loaded
    monkeypatch.setenv("QHUB_KERNEL", "marlin")
    assert missing("marlin", "marlin_bf16") is None and gptqmodel.loaded == ["marlin_bf16"]


def test_what_is_compiled_is_loaded(gptqmodel, tmp_path):
    (tmp_path / "fingerprint").mkdir()
    (tmp_path / "fingerprint" / "ops.so").touch()
    assert missing("marlin", "marlin_bf16") is None and gptqmodel.loaded == ["marlin_bf16"]
    gptqmodel.load = lambda name: {name: False}
    assert "could not load it: nvcc is too old" in missing("marlin", "marlin_bf16")


def test_another_gptqmodel(gptqmodel):
    assert "otherwise than 7.7" in missing("machete", "machete")
    del gptqmodel._EXTENSION_SPECS_BY_NAME
    assert "otherwise than 7.7" in missing("marlin", "marlin_bf16")
