"""Kernels go by measured times, then by those of neighbours in size, then by guesses, then by rank."""

from __future__ import annotations

import pytest
import torch

from qhub.kernels import dispatch
from qhub.kernels.hardware import Card, card_name, nominal
from qhub.kernels.ordering import Clock
from qhub.kernels.roofline import Cost, Work, guess
from qhub.kernels.signature import signature
from qhub.kernels.spec import KernelSpec, Problem
from qhub.kernels.tables import Entry, Shape, Table, user_file

from .conftest import affine

CPU = torch.device("cpu")
FAST, SLOW = Cost(bandwidth=0.9, rate=0.9, launch=0.0), Cost(bandwidth=0.09, rate=0.09, launch=0.0)


def steps(choice):
    return [(limit, name) for limit, name, _ in choice.steps]


def tabled(times, configs=None, packages=None, shape=(48, 64), dtype="float32"):
    """Write the user's table: {kernel key: {M: microseconds or (microseconds, config)}}."""
    layout, _ = affine()
    table = Table(Card(card_name(CPU), 1e10, nominal(CPU).rates, measured=True))
    for key, rows in times.items():
        entries = {
            m: Entry(us[0] * 1e-6, us[1]) if isinstance(us, tuple) else Entry(us * 1e-6) for m, us in rows.items()
        }
        table.put(signature(layout), Shape(*shape, dtype), key, entries)
        table.configs[key] = configs or {}
        table.packages[key] = packages or {}
    table.write(user_file(card_name(CPU)))
    dispatch.forget()


def test_without_times_ranks_decide(offer):
    offer(few={"rank": 20, "max_m": 8}, many={"rank": 10})
    choice = dispatch.choose(*affine(), torch.float32)
    assert steps(choice) == [(8, "few"), (float("inf"), "many")]


def test_measured_times_decide_for_each_m(offer):
    offer(a={"rank": 50}, b={"rank": 1})
    tabled({"a:1": {1: 10, 16: 10, 64: 30}, "b:1": {1: 5, 16: 20, 64: 20}, "reference:1 through torch": {1: 90, 64: 5}})
    choice = dispatch.choose(*affine(), torch.float32)
    assert [choice.name(m) for m in (1, 16, 64, 5000)] == ["b", "a", "reference", "reference"]
    assert choice.times[1][0].source == "measured" and choice.times[4][0].source == "interpolated"


def test_other_versions_are_forgotten(offer):
    offer(a={"rank": 2, "version": 2}, b={"rank": 1})
    tabled({"a:1": {1: 1}, "b:1": {1: 5}})
    choice = dispatch.choose(*affine(), torch.float32)
    # Nothing is known of this version of a, and its rank is the highest.
    assert choice.times[1][0][:2] == ("a", None) and choice.name(1) == "a"


def test_other_packages_make_a_time_less_sure(offer):
    offer(a={"packages": ("numpy",)})
    tabled({"a:1": {1: 1}}, packages={"numpy": "0.0.1"})
    choice = dispatch.choose(*affine(), torch.float32)
    assert choice.times[1][0].source == "interpolated"


def test_configs_are_passed_to_kernels(offer):
    calls = offer(a={}, b={"bind": True})
    configs = {"wide": {"columns": 8}}
    rows = {1: (1, "wide"), 2: 1}
    tabled({"a:1": rows}, configs)
    layout, parts = affine()
    x = torch.randn(2, 64)
    choice = dispatch.choose(layout, parts, torch.float32)
    calls.seen.clear()
    choice.pick(1)(x[:1], layout, parts)
    choice.pick(2)(x, layout, parts)
    assert calls.seen == [("a", 1, {"columns": 8}), ("a", 2, None)]
    tabled({"b:1": rows, "a:1": {1: 9, 2: 9}}, configs)
    choice = dispatch.choose(layout, parts, torch.float32)
    calls.seen.clear()
    choice.pick(1)(x[:1], layout, parts)
    choice.pick(2)(x, layout, parts)
    assert calls.seen == [("b", 1, {"columns": 8}), ("b", 2, None)]


def test_neighbours_in_size_tell_the_time(offer):
    offer(a={"rank": 50}, b={"rank": 1})
    tabled({"a:1": {1: 40, 64: 10}, "b:1": {1: 10, 64: 40}}, shape=(96, 64))
    choice = dispatch.choose(*affine(), torch.float32)
    assert (choice.name(1), choice.name(64)) == ("b", "a")
    one = choice.times[1][0]
    # Half the rows, at the same share of the floor.
    assert one.source == "interpolated" and 4e-6 < one.seconds < 6e-6


@pytest.mark.parametrize(("shape", "config"), [((96, 64), "wide"), ((480, 640), None)])
def test_neighbours_lend_their_config_if_they_are_near(offer, shape, config):
    offer(a={})
    tabled({"a:1": {1: (1, "wide")}}, {"wide": {"columns": 8}}, shape=shape)
    assert dispatch.choose(*affine(), torch.float32).times[1][0].config_name == config


def test_a_guess_orders_what_nobody_measured(offer):
    offer(a={"cost": SLOW, "rank": 50}, b={"cost": FAST, "rank": 1})
    choice = dispatch.choose(*affine(), torch.float32)
    assert [one.source for one in choice.times[1]] == ["guessed"] * 3 and choice.name(1) == "b"


def test_an_unknown_kernel_needs_the_highest_rank(offer):
    offer(a={"cost": FAST, "rank": 5}, b={"rank": 4}, c={"rank": 6})
    choice = dispatch.choose(*affine(), torch.float32)
    assert [one.name for one in choice.times[1]] == ["c", "a", "reference", "b"]


def test_a_guess_must_beat_a_measurement_clearly(offer):
    offer(a={}, b={"cost": FAST})
    layout, parts = affine()
    spec = KernelSpec("b", "", "affine", cost=FAST)
    problem = Problem(layout, "cpu", torch.float32)
    tabled({"a:1": {1: 1}})
    guessed = dispatch.clock(problem, parts).timing(spec, 1).seconds * 1e6
    for factor, first in ((1.1, "a"), (1.4, "b")):
        tabled({"a:1": dict.fromkeys((1,), guessed * factor)})
        assert dispatch.choose(layout, parts, torch.float32).name(1) == first


def test_forcing_ignores_times_and_limits(offer, monkeypatch):
    offer(a={"max_m": 4}, b={})
    tabled({"a:1": {1: 100}, "b:1": {1: 1}})
    monkeypatch.setenv("QHUB_KERNEL", "a")
    choice = dispatch.choose(*affine(), torch.float32)
    assert steps(choice) == [(float("inf"), "a")] and choice.refused["b"] == "QHUB_KERNEL=a"


def test_between_and_beyond_measured_rows(cache):
    layout, parts = affine()
    problem = Problem(layout, "cpu", torch.float32)
    table = Table(Card("x", 1e9, {"half": 1e12, "byte": 1e12, "vector": 1e9}))
    table.put(signature(layout), Shape(48, 64, "float32"), "a:1", {4: Entry(1e-3), 16: Entry(4e-3)})
    clock = Clock(problem, parts, table.card, [table])
    spec = KernelSpec("a", "", "affine")
    assert clock.timing(spec, 8).seconds == pytest.approx(2e-3)
    # Beyond, the arithmetic decides: twice the rows, twice the time.
    assert clock.timing(spec, 4096).seconds == pytest.approx(4e-3 * 4096 / 16, rel=1e-6)
    assert clock.timing(spec, 1).seconds < 1e-3


def test_the_guess_is_the_roofline():
    card = Card("x", 1e12, {"half": 1e14, "byte": 2e14, "vector": 1e13})
    work = Work(4096, 4096, 4096 * 4096 // 2, 2)
    cost = Cost(bandwidth=1.0, rate=1.0, launch=0.0)
    assert guess(cost, work, 1, card) == pytest.approx((8388608 + 2 * 8192) / 1e12)
    assert guess(cost, work, 4096, card) == pytest.approx(2 * 4096**3 / 1e14)
    assert work.floor(1, card) == pytest.approx(guess(cost, work, 1, card))
    # A tile of 16 rows computes 16, and a kernel that reads the weight for every four rows reads it twice for 8.
    tiled = Cost(bandwidth=1.0, rate=0.0001, tile=16, launch=0.0)
    assert guess(tiled, work, 1, card) == guess(tiled, work, 16, card) < guess(tiled, work, 17, card)
    passing = Cost(bandwidth=1.0, rate=1.0, passes=4, launch=0.0)
    assert guess(passing, work, 8, card) > 1.9 * guess(passing, work, 4, card)
    dense = Cost(bandwidth=1.0, rate=1.0, through_dense=True, launch=0.0)
    assert guess(dense, work, 1, card) > 4 * guess(cost, work, 1, card)


def test_nominal_rates_of_cards():
    from types import SimpleNamespace

    from qhub.kernels.hardware import _gpu

    h100 = SimpleNamespace(
        multi_processor_count=132,
        clock_rate=1980000,
        memory_clock_rate=2619000,
        memory_bus_width=5120,
        major=9,
        minor=0,
    )
    card = _gpu("NVIDIA H100 80GB HBM3", h100)
    # Measured: 3.02 TB/s, 735 to 780 TFLOP/s.
    assert card.bandwidth == pytest.approx(3.02e12, rel=0.05) and card.rates["half"] == pytest.approx(7.6e14, rel=0.1)
    bare = SimpleNamespace(multi_processor_count=10, major=99, minor=0)
    assert _gpu("unheard of", bare).bandwidth > 0


def cost_of_size(problem: Problem) -> Cost:
    """Be fast for weights of 48 rows alone."""
    return FAST if problem.layout.out_features == 48 else SLOW


def test_a_cost_may_depend_on_the_weight(offer):
    offer(a={"rank": 1, "cost": f"{__name__}:cost_of_size"}, b={"rank": 1, "cost": Cost(bandwidth=0.5, rate=0.5)})
    assert [dispatch.choose(*affine(n), torch.float32).name(64) for n in (48, 64)] == ["a", "b"]
