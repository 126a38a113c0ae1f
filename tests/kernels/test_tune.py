"""Tuning measures what can run, drops what is wrong, remembers the fastest, and everything after it goes by that."""

from __future__ import annotations

import time

import pytest
import torch

import qhub
from qhub.errors import UnsupportedError
from qhub.kernels import dispatch, reference, timing
from qhub.kernels.hardware import card_name
from qhub.kernels.tables import Table, user_file
from qhub.tensor import QuantizedTensor

from .conftest import affine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(timing, "_LENGTH_ELSEWHERE", 2e-4)
    monkeypatch.setattr(timing, "_CACHE_UNKNOWN", 8192)


def slowed(seconds):
    """Return a kernel that takes so long more: a number, or a function of M and config."""

    def run(x, layout, parts, bias=None, config=None):
        end = time.perf_counter() + (seconds(x.shape[0], config) if callable(seconds) else seconds)
        y = reference.linear(x, layout, parts, bias)
        while time.perf_counter() < end:
            pass
        return y

    return run


def model(dtype=torch.float32):
    made = torch.nn.ModuleList()
    for n, k in ((48, 64), (48, 64), (32, 64)):
        one = torch.nn.Linear(k, n, bias=False)
        one.weight = torch.nn.Parameter(QuantizedTensor.build(*affine(n, k), dtype), requires_grad=False)
        made.append(one)
    return made


def test_the_fastest_is_remembered(offer):
    offer(a={"impl": slowed(lambda m, _: 1e-3 if m == 1 else 6e-3), "rank": 9}, b={"impl": slowed(3e-3)})
    network = model()
    said = []
    result = qhub.tune(network, rows=(1, 64), progress=lambda done, total, text: said.append((done, total)))
    # Two sizes, two numbers of rows.
    assert len(result.changes) == 4 and said[0] == (0, 4) and said[-1] == (4, 4)
    assert result.path == user_file(card_name(CPU)) and result.path.is_file()
    # Nothing beats the reference, which waits for nobody.
    assert all(change.after == "reference" for change in result.changes)
    for change in result.changes:
        assert change.seconds["a"] == pytest.approx(1e-3 if change.m == 1 else 6e-3, rel=0.5)
        assert change.control == pytest.approx(1.0, abs=0.5)
    choice = dispatch.choose(*affine(), torch.float32)
    assert [one.name for one in choice.times[1]] == ["reference", "a", "b"]
    assert [one.name for one in choice.times[64]] == ["reference", "b", "a"]
    text = str(qhub.explain(network))
    assert "M 1: reference" in text and "b slower: " in text and " us against " in text
    assert "before: a" in str(result)


def test_configs_are_measured_and_kept(offer):
    wanted = {"half": {"factor": 1}, "whole": {"factor": 4}}
    offer(
        a={
            "impl": slowed(lambda m, config: 2e-3 * (config or {"factor": 2})["factor"]),
            "tunables": lambda problem, parts, m: wanted,
        }
    )
    result = qhub.tune(model(), rows=(2,))
    table = Table.read(result.path)
    (entry,) = {kernels["a:1"][2].config for shapes in table.times.values() for kernels in shapes.values()}
    assert entry == "half" and table.configs["a:1"]["half"] == {"factor": 1}


def test_what_was_measured_before_stays(offer):
    offer(a={})
    qhub.tune(model()[:1], rows=(1,))
    qhub.tune(model()[2:], rows=(1,))
    table = Table.read(user_file(card_name(CPU)))
    assert {shape.n for shapes in table.times.values() for shape in shapes} == {48, 32}


def test_other_rows_stay_and_other_versions_go(offer, monkeypatch):
    from qhub.kernels import contest

    offer(a={"packages": ("numpy",)})
    qhub.tune(model()[:1], rows=(1,))
    qhub.tune(model(), rows=(2,))
    table = Table.read(user_file(card_name(CPU)))
    rows = {shape.n: sorted(kernels["a:1"]) for shapes in table.times.values() for shape, kernels in shapes.items()}
    assert rows == {48: [1, 2], 32: [2]}
    monkeypatch.setattr(contest, "packages_of", lambda spec: dict.fromkeys(spec.packages, "99"))
    qhub.tune(model()[:1], rows=(4,))
    table = Table.read(user_file(card_name(CPU)))
    kernels = {shape.n: kernels for shapes in table.times.values() for shape, kernels in shapes.items()}
    assert sorted(kernels[48]["a:1"]) == [4] and "a:1" not in kernels[32]
    # The reference depends on no package.
    assert sorted(kernels[48]["reference:1 through torch"]) == [1, 2, 4]


@pytest.mark.filterwarnings("ignore:a kernel gave a wrong result")
def test_what_is_wrong_at_some_m_is_dropped(offer):
    def wrong(x, layout, parts, bias=None):
        y = reference.linear(x, layout, parts, bias)
        return y * 2 if x.shape[0] > 10 else y

    offer(a={"impl": wrong, "rank": 9})
    result = qhub.tune(model()[:1], rows=(1, 16))
    assert "differs from the reference" in result.dropped["a"]
    assert [set(change.seconds) for change in result.changes] == [{"a", "reference"}, {"reference"}]
    assert "dropped a" in str(result)


def test_bridges_wait_to_be_asked(offer):
    def prepare(layout, parts, dtype):
        return {"dense": layout.dequantize(parts, dtype).t().contiguous()}

    def run(x, layout, parts, bias=None):
        return x @ parts["dense"] if bias is None else x @ parts["dense"] + bias

    offer(a={"impl": run, "prepare": prepare})
    network = model()[:1]
    assert all("a" not in change.seconds for change in qhub.tune(network, rows=(1,)).changes)
    assert "second copy" in dispatch.choose(*affine(), torch.float32).refused["a"]
    assert all("a" in change.seconds for change in qhub.tune(network, rows=(1,), bridges=True).changes)
    choice = dispatch.choose(*affine(), torch.float32)
    # It multiplies a weight that is decoded already.
    assert choice.name(1) == "a"
    with torch.no_grad():
        network[0](torch.randn(1, 64))
    (said,) = qhub.explain(network).layers
    assert said.prepared == 48 * 64 * 4 and "second copy of the weight: 12288 bytes" in "\n".join(said.lines())


def test_nothing_to_measure_is_an_error(cache):
    with pytest.raises(UnsupportedError, match="no quantized weight"):
        qhub.tune(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="meta device"):
        qhub.tune(model().to("meta"))


def test_the_shipped_table_is_made_and_the_user_s_comes_first(offer, tmp_path, monkeypatch):
    from qhub.kernels import standard
    from qhub.kernels.tables import Entry, shipped_file

    offer(a={})
    monkeypatch.setattr(standard, "_SHAPES", ((64, 128),))
    monkeypatch.setattr(standard, "_MORE", ())
    monkeypatch.setattr(dispatch, "shipped_file", lambda card: tmp_path / "cards" / shipped_file(card).name)
    standard.main(["--out", str(tmp_path / "cards"), "--rows", "1,8", "--device", "cpu"])
    own, shipped = dispatch.tables(card_name(CPU))
    assert own is None and shipped is not None and len(shipped.times) == 7
    (layout,) = [one for one in standard._layouts(64, 128) if one.kind == "lookup"]
    parts = standard._random(layout, CPU, torch.bfloat16)
    choice = dispatch.choose(layout, parts, torch.bfloat16)
    assert choice.times[1][0].source == "measured" and choice.times[1][0].name == "reference"
    # The user says that the reference takes a second.
    for shapes in shipped.times.values():
        for kernels in shapes.values():
            kernels["reference:1 through torch"] = {1: Entry(1.0)}
    shipped.write(user_file(card_name(CPU)))
    dispatch.forget()
    assert dispatch.choose(layout, parts, torch.bfloat16).times[1][0].seconds == 1.0


def test_warming_runs_everything_once(offer):
    from qhub.kernels.contest import warmed
    from qhub.kernels.tune import tasks

    calls = offer(a={"bind": True, "tunables": lambda problem, parts, m: {"wide": {"factor": m}}}, b={"max_m": 4})
    (task,) = tasks(model()[:1])
    calls.seen.clear()
    warmed(task, (1, 8))
    # Besides those that compare it with the reference.
    ran = [one for one in calls.seen if one[1] in (1, 8)]
    for wanted in (("a", 1, None), ("a", 1, {"factor": 1}), ("b", 1, None), ("a", 8, None), ("a", 8, {"factor": 8})):
        assert wanted in ran
    assert not any(name == "b" and m == 8 for name, m, _ in ran)


def test_seconds_bound_the_shipped_table(offer, tmp_path, capsys):
    from qhub.kernels import standard

    offer()
    standard.main(["--out", str(tmp_path), "--rows", "1", "--device", "cpu", "--seconds", "0"])
    assert "stopped after 0 s" in capsys.readouterr().err and not list(tmp_path.glob("*.json"))
