"""Other processors, missing packages, no OpenMP, folders that cannot be written: what is used, and what is said."""

from __future__ import annotations

import importlib.util
import inspect
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from qhub_cpu import compiled, int8, launch, products
from qhub_cpu.admission import machine_reason
from qhub_cpu.doctor import findings
from qhub_cpu.plans import plan_of
from qhub_cpu.threads import openmp

# Products of several kinds of layouts, on two threads, against the reference; prints what the processor is seen as.
CHECK = """
import torch
torch.set_num_threads(2)
from qhub.kernels import reference
from qhub.layouts import Affine, Grid, Lookup
from qhub_cpu.linear import few_rows, many_rows
from qhub_cpu.processor import level
from qhub_cpu.threads import openmp

torch.manual_seed(0)
n, k = 1030, 512
for kind, bits in (("lookup", 4), ("affine", 3), ("affine", 8)):
    if kind == "lookup":
        layout = Lookup(out_features=n, in_features=k, bits=bits, grid=Grid.along_k(64))
        extra = {"table": torch.randn(16)}
    else:
        layout = Affine(out_features=n, in_features=k, bits=bits, grid=Grid.along_k(64), zero="value", math="scales")
        extra = {"zeros": torch.rand(n, 8).bfloat16()}
    spec = layout.part_specs()["qweight"]
    scales = torch.rand(n, 8) + 0.5
    parts = {"qweight": torch.randint(0, 256, spec.shape, dtype=torch.uint8), **extra}
    parts["scales"] = scales.bfloat16() if kind == "affine" else scales
    x = torch.randn(5, k)
    expected = reference.linear(x, layout, parts)
    for run in (few_rows, many_rows):
        error = (run(x, layout, parts) - expected).norm() / expected.norm()
        assert error < 1e-6, (kind, bits, run.__name__, float(error))
print(level(), openmp() is not None)
"""


def _run(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize(
    ("features", "level"),
    [("+avx2,+fma,+f16c", "AVX2"), ("+avx,+fma,+f16c", "no lookup instruction")],
    ids=["AVX2", "without lookups, as ARM64"],
)
def test_other_instruction_sets(features, level):
    said = _run(NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES=features)
    assert said.startswith(level)


def test_threads_without_openmp():
    assert _run(QHUB_CPU_OPENMP="0").endswith("False")


@pytest.mark.skipif(sys.platform != "linux", reason="torch's wheels for Linux bring GNU's OpenMP")
def test_torchs_own_threads_are_found():
    assert openmp() is not None


def test_the_entry_module_is_light():
    code = (
        "import sys, qhub_cpu; qhub_cpu.qhub_kernels(); sys.exit('numba' in sys.modules or 'llvmlite' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_doctor_speaks_of_numba():
    assert any("numba" in finding.message and finding.status == "ok" for finding in findings())


def test_without_numba_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert "pip install numba" in (machine_reason() or "")
    assert findings()[0].remedy == "pip install numba"


def test_a_processor_that_lacks_instructions_is_refused_with_their_names(monkeypatch):
    monkeypatch.setattr("qhub_cpu.processor.features", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert machine_reason() == "needs a processor with f16c, fma"
    assert "f16c, fma" in findings()[0].message
    monkeypatch.setattr(platform, "machine", lambda: "ppc64le")
    assert "not ppc64le" in (machine_reason() or "")


def test_code_is_compiled_where_no_folder_can_be_written(monkeypatch):
    from numba.core import caching

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    add = compiled.entry(lambda a, b: a + b)
    assert add(2, 3) == 5
    assert compiled.body(lambda block: None).address
    assert any("NUMBA_CACHE_DIR" in (finding.remedy or "") for finding in findings())


def test_kept_code_is_told_from_that_of_other_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def build(key: int) -> Any:
        def empty(block):
            _ = key

        return compiled.body(empty)

    assert build(1).cache_hits == 0
    assert build(1).cache_hits == 1
    assert build(2).cache_hits == 0


def test_all_kept_code_carries_the_seal(make):
    case = make["affine"](2)
    variant = plan_of(case.layout, case.parts)[0].variant
    bodies = [products.product(variant).__wrapped__, products.decoder(variant, 0).__wrapped__]
    entries = [made().py_func for made in (launch.launcher, launch.rounder, int8._rounding, int8._scaling)]
    for function in bodies + entries:
        assert inspect.getclosurevars(function).nonlocals["key"] == compiled.seal()


def test_the_seal_follows_the_sources(monkeypatch, tmp_path):
    before = compiled.seal.__wrapped__()
    for path in Path(compiled.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    assert compiled.seal.__wrapped__() == before
    (tmp_path / "vectors.py").write_text("changed")
    assert compiled.seal.__wrapped__() != before


def test_plans_go_with_their_layouts(make):
    from qhub_cpu.plans import _known

    case = make["affine"](4)
    plan_of(case.layout, case.parts)
    key = id(case.layout)
    assert key in _known
    case.layout = None
    assert key not in _known
    assert torch.get_num_threads() >= 1
