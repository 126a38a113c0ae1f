"""Fused parts of a deep model: what roundings move is no reason to leave them out, what is wrong is."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

import qhub
from qhub.decoding import prompts, rounding, steps
from qhub.decoding.operations import REFERENCE
from qhub.decoding.optimizing import _decoders
from qhub.decoding.rounding import disagreement, rounded_outputs
from qhub.decoding.steps import StaticStep
from qhub.decoding.trials import difference, tolerance

from .conftest import KINDS, counted, deep


def written(model: Any, caplog: pytest.LogCaptureFixture) -> bool:
    """Generate with ``model`` optimized, and return whether its parts were left out."""
    qhub.optimize(model)
    ids = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(1))
    with caplog.at_level(logging.INFO, "qhub"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    return "left out" in caplog.text


def test_a_model_that_amplifies_roundings_keeps_its_fused_parts(caplog, monkeypatch):
    seen = []

    def noted(found: torch.Tensor, wanted: torch.Tensor) -> float:
        seen.append(difference(found, wanted))
        return seen[-1]

    monkeypatch.setattr(rounding, "difference", noted)
    # Were the bound fixed, this model would not stay within it.
    monkeypatch.setitem(rounding._SLACK, torch.bfloat16, 0.5)
    assert not written(deep(0.3), caplog)
    # Of the step; those of the prompt follow.
    error, moved = seen[:2]
    assert 0.5 * tolerance(torch.bfloat16) < error < 3 * moved


@pytest.mark.parametrize("std", [0.05, 0.3])
def test_parts_that_compute_something_else_are_left_out(std, caplog, monkeypatch):
    """Each is so little off that it passes alone; in 24 layers they add up to something else."""

    def gate(up_gate: torch.Tensor, *rest: Any) -> torch.Tensor:
        return REFERENCE.gate(up_gate, *rest) * 1.03

    def add_norm(*given: Any) -> Any:
        total, normed = REFERENCE.add_norm(*given)
        return total, normed * 1.03

    wrong = replace(REFERENCE, name="wrong", gate=gate, add_norm=add_norm)
    monkeypatch.setattr(steps, "offered", lambda device: (wrong,))
    monkeypatch.setitem(rounding._SLACK, torch.bfloat16, 0.5)
    monkeypatch.setattr(rounding, "_ROUNDINGS", 0.3)
    assert written(deep(std), caplog)
    (said,) = [message for message in caplog.messages if "left out" in message]
    assert "logits differ by" in said and "more than" in said and "moves them by" in said


@pytest.mark.parametrize("measured", [False, True])
def test_a_step_is_run_once_more_only_where_it_passes_the_fixed_bound(measured, monkeypatch):
    runs = []
    own = StaticStep.fuse

    def fuse(step: StaticStep) -> None:
        with counted() as forwards:
            own(step)
        runs.append(len(forwards))

    monkeypatch.setattr(StaticStep, "fuse", fuse)
    if measured:
        monkeypatch.setitem(rounding._SLACK, torch.bfloat16, 0.0)
    model = deep(0.05)
    qhub.optimize(model)
    ids = torch.arange(3, 9)[None]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert runs == [3 if measured else 2]
    (step,) = _decoders[model].steps.values()
    assert step.found["layers"] == 24


def test_a_measured_step_goes_on_as_one_that_was_not(monkeypatch, make):
    """Measuring leaves the step in the form and the place it was found in."""
    found = []
    for slack in (10.0, 0.0):
        monkeypatch.setitem(rounding._SLACK, torch.float32, slack)
        monkeypatch.setattr(rounding, "_ROUNDINGS", 100.0)
        model = make("llama")
        qhub.optimize(model)
        ids = torch.arange(3, 12)[None]
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        (step,) = _decoders[model].steps.values()
        assert step.found["layers"] == 3 and step.masks is not None
        assert all(layer.cumulative_length is step.state.position for layer in step.cache.layers)
        found.append(text)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_run_once_more_is_what_was_run(kind, monkeypatch, make):
    """Without roundings the model's own code computes the same numbers again, of a step and of a prompt."""
    places = []

    def told(place: str) -> Any:
        def disagreement(model: Any, found: Any, wanted: Any, again: Any) -> None:
            repeated = again()
            assert repeated.keys() == wanted.keys() == found.keys()
            assert all(torch.equal(repeated[name], own) for name, own in wanted.items())
            places.append(place)

        return disagreement

    monkeypatch.setattr(steps, "disagreement", told("step"))
    monkeypatch.setattr(prompts, "disagreement", told("prompt"))
    model = make(kind)
    qhub.optimize(model)
    ids = torch.arange(3, 12).expand(2, 9)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert places[0] == "step" and len(places) == (2 if _decoders[model].prompt else 1)


def test_disagreement():
    plain = torch.ones(4, dtype=torch.float32)
    asked = []

    def again(moved: float) -> dict[str, torch.Tensor]:
        asked.append(moved)
        return {"a": plain, "b": plain + moved}

    def tell(b: torch.Tensor, moved: float) -> str | None:
        model = torch.nn.Identity()
        return disagreement(model, {"a": plain, "b": b}, {"a": plain, "b": plain}, lambda: again(moved))

    assert tell(plain + 9e-4, 0.0) is None
    assert "float16" in str(tell(plain.half(), 1.0))
    assert "(2,)" in str(tell(plain[:2], 1.0))
    assert asked == []
    assert tell(plain + 0.2, 0.1) is None
    assert "b differ by 0.4 of their length, more than 0.3;" in str(tell(plain + 0.4, 0.1))
    # However far roundings move it: what is half its length off is another result.
    assert "more than 0.5;" in str(tell(plain + 0.6, 10.0))
    for no_number in (float("nan"), float("inf")):
        assert "more than 0.001;" in str(tell(plain + 0.2, no_number))
        assert "more than 0.3;" in str(tell(plain + no_number, 0.1))


def test_rounded_outputs_use_no_random_numbers_and_end():
    model = deep(0.05)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        plain = model(ids).logits
        state = torch.random.get_rng_state()
        with rounded_outputs(model):
            first = model(ids).logits
        assert torch.equal(torch.random.get_rng_state(), state)
        with rounded_outputs(model):
            assert torch.equal(model(ids).logits, first)
        assert not torch.equal(first, plain)
        assert torch.equal(model(ids).logits, plain)
