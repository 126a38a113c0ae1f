"""The conformance kit with a method that calibrates: few samples, and which input scales it accepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from qhub.layouts import Transform
from qhub.testing import MethodConformance
from qhub.testing.conformance.calibrating import calibrate_with_few
from qhub.testing.conformance.subject import Subject
from qhub.testing.conformance.workbench import Workbench, quantized_weights

pytest.importorskip("qhub_awq")


class Kit(MethodConformance):
    """Is never collected (its name has no Test): the tests below call what it inherits."""

    method = "awq"
    configs = ({"bits": 4, "group_size": 32},)
    architectures = ("qwen3_moe",)
    hidden_size = 64
    calibration = {"min_tokens": 7}


MIXTURE = Subject(0, "qwen3_moe")


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    calibrate_with_few(monkeypatch, Kit.calibration)
    return Workbench.of(Kit, tmp_path_factory)


@pytest.fixture
def model(bench: Workbench) -> Any:
    return bench.model(MIXTURE)


def test_the_kit_calibrates_with_few_samples_of_its_own(model: Any) -> None:
    report = model.hf_quantizer.calibration
    attention = [layer for layer in report.layers if "self_attn" in layer.name]
    assert len(attention) == 8
    assert {layer.tokens for layer in attention} == {256}
    assert not any("wrote" in warning for warning in report.warnings), "the model had to write its own text"


def test_fields_of_the_class_reach_the_engine(bench: Workbench) -> None:
    from qhub.integrations.transformers import calibrating

    config = bench.parse({**Kit.configs[0], "model_seqlen": 5})
    options = calibrating.options_of("awq", config, seed=3, samples=None)
    assert (options.min_tokens, options.length, options.samples, options.seed) == (7, 16, 16, 3)


def test_a_leading_input_scale_of_the_engine_is_no_difference_to_the_plan(model: Any, bench: Workbench) -> None:
    scaled = [
        n for n, w in quantized_weights(model).items() if w.quant_layout.transforms == (Transform("scale", "in"),)
    ]
    assert scaled, "no weight got an input scale, so this test shows nothing"
    Kit().test_plan_needs_no_data(MIXTURE, bench)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another group size": lambda layout: dataclasses.replace(layout, grid=dataclasses.replace(layout.grid, cols=64)),
    "a scale of the output": lambda layout: dataclasses.replace(layout, transforms=(Transform("scale", "out"),)),
    "two scales": lambda layout: dataclasses.replace(layout, transforms=(Transform("scale", "in"),) * 2),
    "a permutation before the scale": lambda layout: dataclasses.replace(
        layout, transforms=(Transform("permute", "in"), Transform("scale", "in"))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_other_difference_is_found(
    change: Callable[[Any], Any], bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qhub.testing.conformance import plans

    class Weight:
        def __init__(self, layout: Any) -> None:
            self.quant_layout = layout

    monkeypatch.setattr(
        plans,
        "quantized_weights",
        lambda model: {n: Weight(change(w.quant_layout)) for n, w in quantized_weights(model).items()},
    )
    with pytest.raises(AssertionError, match="planned"):
        Kit().test_plan_needs_no_data(MIXTURE, bench)
