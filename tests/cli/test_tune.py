"""``qhub tune``: measures, writes a table, says what changed; and wrong usage."""

from __future__ import annotations

import json

import pytest

from qhub.kernels import dispatch, timing
from qhub.kernels.tables import Table


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_LENGTH_ELSEWHERE", 1e-4)
    monkeypatch.setattr(timing, "_CACHE_UNKNOWN", 8192)
    monkeypatch.setenv("QHUB_CACHE", str(tmp_path / "cache"))
    dispatch.forget()
    yield
    dispatch.forget()


def test_tune_writes_what_it_measured(as_json, run, quantized, tmp_path):
    data = as_json("tune", quantized, "--rows", "1,4", "--dtype", "float32")
    assert {change["m"] for change in data["changes"]} == {1, 4}
    table = Table.read(tmp_path / "cache" / "kernels" / data["path"].rpartition("/")[2])
    assert all("reference:1 through torch" in kernels for s in table.times.values() for kernels in s.values())
    said = run("explain", quantized, "--dtype", "float32").stdout
    assert " slower: " in said and " us against " in said
    text = run("tune", quantized, "--rows", "1", "--out", tmp_path / "own.json")
    assert text.exit_code == 0 and "cells measured" in text.stdout and "written to" in text.stdout
    assert json.loads((tmp_path / "own.json").read_text())["rows"] == [1]


@pytest.mark.parametrize("rows", ["", "1,x", "0", "-1,2"])
def test_rows_that_are_none(run, quantized, rows):
    result = run("tune", quantized, f"--rows={rows}")
    assert result.exit_code == 2 and "numbers of rows" in " ".join(result.stderr.replace("│", " ").split())


def test_two_devices_at_once(run, quantized):
    result = run("tune", quantized, "--device", "cpu", "--device-map", "auto")
    assert result.exit_code == 2 and result.stdout == ""
