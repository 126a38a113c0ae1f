"""The GPU benchmark's arithmetic: what is measured, compared within one run, merged, and held against the goals."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu import cells, goals, report
from benchmarks.gpu.native_peers import machete_schedule


def cell(contestant, us, n=4096, k=4096, m=1, group="int4", regime="busy", error=0.0017, nbytes=8_650_752, **more):
    return {
        "n": n, "k": k, "m": m, "contestant": contestant, "group": group, "peer": not contestant.startswith("qhub"),
        "dtype": "bfloat16", "bytes": nbytes, "copies": 2, "error": error, "own_error": None, "regime": regime,
        "calls": 10, "rounds": [us, 100 * us, us], **more,
    }  # fmt: skip


def run(name, found, date="2026-01-01T00:00:00+00:00"):
    read = {"driver_version": "1", "power.limit": "1 W", "clocks.sm": "1", "clocks.max.sm": "1", "clocks.mem": "1"}
    machine = {"start": "a", "gpu": "card", "read": read, "python": "3", "cuda": "13", "versions": {"torch": "2"}}
    ceilings = [
        {"when": when, "copy_gbs": speed, "bf16_tflops": 700.0} for when, speed in (("before", 2900), ("after", 3000))
    ]
    return {
        "id": name, "date": date, "machine": machine, "seed": 0, "contestants": [], "ceilings": ceilings, "missing": {},
        "wrong": [], "failed": [], "cells": found, "done": [],
    }  # fmt: skip


def test_shapes_and_rows_are_parsed():
    assert cells.parse_shapes("4096x14336,8x16") == [(4096, 14336), (8, 16)]
    assert cells.parse_shapes("all") == list(cells.SHAPES)
    assert cells.parse_rows("3,16-128") == [3, 16, 32, 64, 128]
    assert cells.parse_rows("all") == list(cells.ROWS)
    for text in ("4096", "4096x", "axb"):
        with pytest.raises(ValueError, match="N x K"):
            cells.parse_shapes(text)
    for text in ("few", "1-", "-4"):
        with pytest.raises(ValueError, match="number of rows"):
            cells.parse_rows(text)


def test_a_slow_round_does_not_count():
    assert cells.value(cell("a", 5.0)) == 5.0


def test_ratios_stay_within_one_run():
    slow = run("1", [cell("qhub_int4", 10.0), cell("marlin_bf16", 12.0)])
    fast = run("2", [cell("qhub_int4", 5.0), cell("marlin_bf16", 6.0), cell("tinygemm_int4", 5.5)], "2026-02-01")
    alone = run("3", [cell("marlin_bf16", 1.0)], "2026-03-01")
    assert goals.ratios([slow, fast, alone], "qhub_int4", {"int4"}, [(4096, 4096)], [1]) == {(4096, 4096, 1): 1.1}
    assert goals.ratios([slow], "qhub_int4", "marlin_bf16", [(4096, 4096)], [1, 2]) == {(4096, 4096, 1): 1.2}


def test_the_null_control_is_no_peer():
    found = run("1", [cell("cublas_bf16", 10.0, group="dense"), cell("cublas_bf16_again", 9.0, group="dense")])
    best = cells.best_peer(found, {"dense"}, 4096, 4096, 1)
    assert best is not None and best["contestant"] == "cublas_bf16"


def test_runs_are_merged_once_and_in_order(tmp_path):
    one, two = run("1", [], "2026-02-01"), run("2", [], "2026-01-01")
    path = tmp_path / "runs.json"
    path.write_text(json.dumps({"runs": [one, two]}))
    assert [each["id"] for each in cells.merge([*cells.load([path]), one])] == ["2", "1"]


def test_the_side_of_the_roofline_that_takes_longer_counts():
    few, many = cell("a", 10.0), cell("a", 200.0, m=4096)
    own = run("1", [few, many])
    part = cells.fraction(few, own)
    assert part is not None and part[1] == "bytes"
    assert part[0] == pytest.approx(8_650_752 / 3000e9 / 10e-6)
    part = cells.fraction(many, own)
    assert part is not None and part[1] == "products"
    assert part[0] == pytest.approx(2 * 4096**3 / 700e12 / 200e-6)


def test_errors_are_compared_with_cublas_of_the_same_cell():
    dense, own = cell("cublas_bf16", 1.0, error=0.002), cell("qhub_int4", 1.0, error=0.003)
    rounded = cell("qhub_fp8_dynamic", 1.0, error=0.03, own_error=0.001)
    found = run("1", [dense, own, rounded])
    assert cells.error_ratio(own, found) == pytest.approx(1.5)
    assert cells.error_ratio(rounded, found) == pytest.approx(0.5)
    assert cells.error_ratio({**own, "m": 2}, found) is None


def test_goals_are_met_or_have_a_gap():
    shapes, rows = cells.SHAPES, [m for m in cells.ROWS if m <= 128]
    good = [cell("qhub_int4", 10.0, n, k, m) for n, k in shapes for m in rows]
    good += [cell("marlin_bf16", 13.0, n, k, m) for n, k in shapes for m in rows]
    met = {row.goal: row.met for row in goals.goal_rows([run("1", good)])}
    assert met["no cell slower by more than 5 %"] and met["geometric mean 1.2"]
    bad = [one if one["m"] != 8 or one["contestant"] != "qhub_int4" else {**one, "rounds": [14.0]} for one in good]
    rows_found = {row.goal: row for row in goals.goal_rows([run("1", bad)])}
    slower = rows_found["no cell slower by more than 5 %"]
    assert slower.met is False and slower.gap == f"{len(shapes)} of {len(good) // 2} cells below 0.95"
    assert all(row.met is None for row in goals.goal_rows([]))


def test_generate_is_held_against_bf16():
    speeds = {"bf16-eager": 46.0, "bf16": 120.0, "int4": 400.0, "hqq": 40.0}
    found = [row for row in goals.goal_rows([], speeds) if "generate" in row.what or row.what.startswith("same, every")]
    assert [row.met for row in found] == [True, False]
    assert found[1].gap == "hqq 40"
    assert goals.goal_rows([], {"bf16": 46.0, "int4": 400.0})[-3].met is None


def test_the_page_and_the_pictures_are_made(tmp_path):
    found = [
        cell(name, us, m=m, group=group, regime=regime)
        for name, group, us in (
            ("cublas_bf16", "dense", 16.0),
            ("qhub_int4", "int4", 5.0),
            ("marlin_bf16", "int4", 10.0),
        )
        for m, regime in ((1, "busy"), (2048, "busy"), (2048, "rested"))
    ]
    one = run("1", found)
    one["missing"] = {"machete_bf16": "FileNotFoundError: no libmachete.so"}
    generate = {"runs": [{"variant": "int4", "batch": 1, "prompt": 32, "tokens_per_s": 400.0, "ms_per_step": 2.5,
                          "prefill_ms": 9.0, "setup_s": 1.0, "peak_gib": 6.0}]}  # fmt: skip
    end_to_end = {"runs": [{"date": "2026", "variants": {"bf16": {"prefill_ms": 60.0, "lora_ms": 300.0}}}]}
    host = {"runs": [{"host_us": {"nn_linear": 15.0, "qhub_int4": 21.0}}]}
    reading = {"runs": [{"cells": [{"n": 4096, "k": 4096, "bytes": 8650752, "us": 4.0}]}]}
    times = {"qhub": 50.0, "grouped_mm": 200.0, "batched_mm": 150.0}
    experts = {"runs": [{"cells": [{"model": "mixtral", "layout": "int4", "tokens": 1, "us": times}]}]}
    others = {"end_to_end": end_to_end, "generate": generate, "host": host, "reading": reading, "experts": experts}
    text = report.document([one], others)
    assert "| qhub_int4 | 21 | +6 |" in text and "| mixtral | int4 | 50 [3.0] |" in text
    assert "| 4096x4096 | 8.7 | 4.0 | 2163 | 5.0 | 0.80 |" in text
    assert "| qhub_int4 | 5.0 [2.00] | 5.0 [2.00] |" in text
    assert "no libmachete.so" in text and "400 tokens/s" in text and "| bf16 |  |  | 60.0 | 300.0 |" in text
    from benchmarks.gpu.plots import draw

    draw([one], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"performance-int4.png", "performance-layouts.png"}


def test_the_committed_page_is_that_of_the_committed_results():
    if (report.RESULTS / "gpu_grid.json").exists():
        runs = cells.merge(cells.load([report.RESULTS / "gpu_grid.json"]))
        text = report.document(runs, report.read_others(report.RESULTS))
        assert (report.ROOT / "docs" / "performance.md").read_text() == text


def test_machete_takes_the_schedules_of_its_heuristic():
    assert machete_schedule(1, 4096, 4096) == "128x16"
    assert machete_schedule(16, 28672, 8192) == "256x16"
    assert machete_schedule(32, 4096, 14336) == "256x32"
    assert machete_schedule(64, 4096, 4096) == "128x16"
    assert machete_schedule(128, 28672, 8192) == "256x128"
    assert machete_schedule(2048, 4096, 14336) == "128x128"


def test_the_host_is_held_against_a_dense_call():
    costs = {"nn_linear": 17.0, "qhub_int4": 30.0, "qhub_fp8": 40.0, "marlin_bf16": 90.0}
    row = goals.goal_rows([], host=[{"host_us": costs}])[-1]
    assert row.met is False and row.gap == "above: qhub_fp8 23"
