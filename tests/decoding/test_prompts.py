"""Fused prompts: kept where a model amplifies what they round elsewhere, refused where a part is wrong."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qhub
from qhub.decoding import prompts, rounding, steps
from qhub.decoding.layers import Forms, Layer
from qhub.decoding.optimizing import _decoders
from qhub.decoding.prompts import prompt_forms

from .conftest import counted, deep, once_rounded


@pytest.fixture
def found(monkeypatch, caplog) -> Callable[[float], tuple[Any, Forms]]:
    """Return a model and the forms of its decode step, whose parts round elsewhere than the model's own code."""
    monkeypatch.setattr(steps, "offered", lambda device: (once_rounded(),))
    caplog.set_level(logging.INFO, "qhub")

    def make(std: float) -> tuple[Any, Forms]:
        model = deep(std)
        qhub.optimize(model)
        ids = torch.arange(3, 9)[None]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
        (step,) = _decoders[model].steps.values()
        assert step.found["layers"] == 24
        assert _decoders[model].prompt and not caplog.text
        return model, step.forms

    return make


def changed(forms: Forms, change: Callable[[Any], None], count: int = 24) -> Forms:
    """Return ``forms`` with ``change`` made to the first ``count`` layers."""
    result = dict(forms)
    layers = [module for module, form in forms.items() if isinstance(form, Layer)]
    for module in layers[:count]:
        result[module] = copy.copy(forms[module])
        change(result[module])
    return result


def test_a_model_that_amplifies_roundings_keeps_its_fused_prompt(found, monkeypatch, caplog):
    model, forms = found(0.3)
    # Were the bound fixed, this model would not stay within it.
    monkeypatch.setitem(rounding._SLACK, torch.bfloat16, 0.5)
    with counted() as forwards:
        assert prompt_forms(model, forms).keys() == forms.keys()
    assert len(forwards) == 3
    assert not caplog.text
    monkeypatch.setattr(rounding, "_ROUNDINGS", 0.0)
    assert not prompt_forms(model, forms)
    assert "prompts are read by the model's own code" in caplog.text


def test_roundings_are_measured_only_where_the_fixed_bound_is_passed(found):
    model, forms = found(0.05)
    with counted() as forwards:
        assert prompt_forms(model, forms)
    assert len(forwards) == 2


@pytest.mark.parametrize("std", [0.05, 0.3])
def test_a_norm_with_another_epsilon_is_refused(found, std, caplog):
    model, forms = found(std)

    def epsilon(eps: float) -> Callable[[Any], None]:
        def change(layer: Any) -> None:
            weight, rule = layer.before_attention
            layer.before_attention = weight, replace(rule, eps=eps)

        return change

    assert prompt_forms(model, changed(forms, epsilon(1e-6), 1))
    assert not caplog.text
    # As much as the embeddings' mean square, in one of 49 norms.
    assert not prompt_forms(model, changed(forms, epsilon(std**2), 1))
    (said,) = caplog.messages
    assert "differ by" in said and "more than" in said and "one more rounding of every part moves them by" in said


@pytest.mark.parametrize("std", [0.05, 0.3])
def test_a_rotation_off_by_one_position_is_refused(found, std, monkeypatch, caplog):
    """Scores depend on distances only, so that logits differ by roundings: the keys show it."""
    model, forms = found(std)
    own = prompts._rotated

    def late(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The first text has no padding: its second place is one position away from its first.
        step = cos[0, 1], sin[0, 1]
        return own(x, cos * step[0] - sin * step[1], sin * step[0] + cos * step[1])

    monkeypatch.setattr(prompts, "_rotated", late)
    assert not prompt_forms(model, forms)
    (said,) = caplog.messages
    assert "keys of layer" in said


@pytest.mark.parametrize(("part", "std"), [("mlp", 0.05), ("norm", 0.05), ("norm", 0.3)])
def test_parts_a_little_off_are_refused(found, part, std, monkeypatch, caplog):
    model, forms = found(std)

    def change(layer: Any) -> None:
        if part == "mlp":
            mlp = layer.mlp
            layer.mlp = lambda x: mlp(x) * 1.1
        else:
            add_norm = layer.family.add_norm

            def off(*given: Any) -> tuple[Tensor, Tensor]:
                total, normed = add_norm(*given)
                return total, normed * 1.06

            layer.family = replace(layer.family, add_norm=off)

    monkeypatch.setitem(rounding._SLACK, torch.bfloat16, 0.5)
    assert prompt_forms(model, forms) and not caplog.text
    assert not prompt_forms(model, changed(forms, change))
    assert "prompts are read by the model's own code" in caplog.text


def test_parts_that_fail_say_why(found, monkeypatch, caplog):
    model, forms = found(0.05)

    def fail(*given: Any) -> Tensor:
        raise ValueError("no such rotation")

    monkeypatch.setattr(prompts, "_rotated", fail)
    assert not prompt_forms(model, forms)
    assert "ValueError: no such rotation" in caplog.text
