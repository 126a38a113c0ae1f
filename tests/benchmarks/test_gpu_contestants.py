"""The GPU benchmark's contestants hold the weights they claim: what can run on a CPU is checked against float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.gpu.case import Case, checked_rows
from benchmarks.gpu.contestants import ALL, chosen
from benchmarks.gpu.gemlite_peer import complete_configurations
from benchmarks.gpu.grid import finished
from benchmarks.gpu.native_peers import words_along_k
from benchmarks.gpu.qhub_contestants import CONTESTANTS
from benchmarks.gpu.reference import Reference


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    return Case(64, 256, device="cpu", rows=17)


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda one: one.name)
def test_qhub_contestants_pass_their_own_check(case, contestant, monkeypatch):
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1.0)
    prepared = contestant.prepare(case)
    reference = Reference(case, contestant, prepared, [1, 17])
    assert prepared.copies == 2
    for m in (1, 17):
        y = prepared.call(case.inputs(contestant.dtype, contestant.outliers)[:m], 1)
        plain, own = reference.errors(y, m)
        assert plain <= contestant.limit
        assert own is None or own <= 0.004
        wrong, _ = reference.errors(y * 1.1, m)
        assert wrong > contestant.limit


def test_codes_are_the_nearest(case):
    q, scales = case.int4
    weight = case.weight.float()
    off = (case.dense_of(q, scales, 8.0) - weight).abs()
    # Half a step, and a little for the scale's rounding to bfloat16 at the ends of the range.
    step = scales.repeat_interleave(128, dim=1)
    assert bool((off <= step * (0.5 + 7 * 2.0**-8)).all())
    ones = case.codes(1)[0]
    assert set(ones.unique().tolist()) == {0, 1} and bool(((ones == 1) == (weight > 0)).all())


def test_words_hold_eight_codes_along_k(case):
    q = case.int4[0]
    words = words_along_k(q)
    assert words.shape == (32, 64)
    for index in range(8):
        assert bool((words.t() >> (4 * index) & 15 == q[:, index::8]).all())


def test_checked_rows_are_the_first_and_the_last():
    assert checked_rows(3) == [0, 1, 2]
    assert checked_rows(100) == [*range(8), *range(92, 100)]


def test_copies_fill_the_cache_six_times():
    assert timing.copies_for(33_554_432) == 9
    assert timing.copies_for(1e9) == 2
    assert timing.copies_for(1.0) == 40


def test_contestants_are_chosen_by_name_group_and_side():
    assert [one.name for one in chosen("cublas_bf16,nf4")] == ["cublas_bf16", "bnb_nf4", "qhub_nf4"]
    assert all(one.peer for one in chosen("peers"))
    assert len(chosen("all,-peers")) == len(CONTESTANTS) == len(chosen("qhub"))
    assert len({one.name for one in ALL.values()}) == len(ALL)
    with pytest.raises(ValueError, match="no contestant"):
        chosen("martin")


def test_gemlite_takes_the_nearest_configuration():
    known = {"(1, 4096, 4096, 128, 8, 104)": {"a": 1}, "(16, 8192, 4096, 4096, 1, 408)": {"b": 2}}
    config = {"GEMM": dict(known)}
    assert complete_configurations(config, [(8192, 8192)], [1, 2]) == 2 + 2 * 3
    assert config["GEMM"]["(2, 8192, 8192, 128, 8, 104)"] == {"a": 1}
    assert config["GEMM"]["(1, 8192, 8192, 8192, 1, 308)"] == {"b": 2}


def test_only_runs_of_this_start_with_all_contestants_count_as_finished():
    def run(start, names):
        return {"machine": {"start": start}, "contestants": names, "done": [[1, 2, 3]]}

    assert finished([run("a", ["x", "y"])], "a", {"x"}) == {(1, 2, 3)}
    assert not finished([run("b", ["x"]), run("a", ["y"])], "a", {"x"})
