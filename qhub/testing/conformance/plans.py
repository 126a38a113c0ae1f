"""Checks that a plan made without data is the plan of the real weights, and that quantizing gives what was planned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qhub.calibration.statistics import neutral
from qhub.errors import LayoutError
from qhub.layouts import Layout, Transform
from qhub.plan import LayerPlan, WeightInfo
from qhub.quantizing import Quantization
from qhub.registry import registry
from qhub.testing.conformance.subject import KitBase, Subject
from qhub.testing.conformance.workbench import Workbench, quantized_weights

__all__ = ["PlanChecks"]

# A weight of a trained layer is around this large; what a dead row decodes to must be nothing beside it.
_TYPICAL, _NOTHING = 0.02, 1e-3


class PlanChecks(KitBase):
    """Asks the hooks ``qhub_plan`` and ``qhub_quantize`` directly."""

    def _planned(self, config: int, bench: Workbench) -> Iterator[LayerPlan]:
        """Yield one plan per distinct layout that ``config`` gives to the tiny models."""
        seen: set[Layout] = set()
        for architecture in self.architectures:
            for planned in bench.model(Subject(config, architecture)).hf_quantizer.plan.values():
                if planned.layout not in seen:
                    seen.add(planned.layout)
                    yield planned

    def test_plan_needs_no_data(self, subject: Subject, bench: Workbench) -> None:
        """On the meta device the plan has the same layouts as the quantized model, and each one fits its weight.

        Only data tell where the input scales of ``qhub_equalize`` fit into the operation before, so the scale that the
        engine puts first where they do not is no part of the plan.
        """
        from qhub.integrations.transformers.weights import find_weights

        if subject.architecture is None:
            pytest.skip("a checkpoint's plan is checked against its files when it is loaded")
        model = bench.model(subject)
        real = {name: weight.quant_layout for name, weight in quantized_weights(model).items()}
        hollow = bench.meta_model(subject.architecture)
        weights = find_weights(hollow, embeddings=any(info.kind == "embedding" for info in _infos(model)))
        infos = [info for name, info in weights.items() if name in real]
        arguments = {
            "config": model.hf_quantizer.quantization_config,
            "weights": infos,
            "model_config": hollow.config,
        }
        plans = [registry.call(self.method, "qhub_plan", **arguments) for _ in range(2)]
        assert dict(plans[0]) == dict(plans[1]), "two calls of qhub_plan with the same arguments differ"
        for info in infos:
            planned = plans[0].get(info.name)
            assert isinstance(planned, LayerPlan), (
                f"{info.name} is quantized, but on the meta device its plan is {planned!r}"
            )
            found = real[info.name]
            if found != planned.layout and planned.statistics and registry.has(self.method, "qhub_equalize"):
                found = _without_input_scale(found)
            assert found == planned.layout, f"{info.name}: planned {planned.layout}, real {real[info.name]}"
            size = (planned.layout.out_features, planned.layout.in_features)
            assert size == (info.out_features, info.in_features), f"{info.name}: the layout is for {size}"
            hash(planned.layout)

    def test_every_weight_is_quantized_or_explained(self, subject: Subject, bench: Workbench) -> None:
        """Nothing is left out in silence: a weight is quantized, or the report says why not."""
        from qhub.integrations.transformers.weights import find_weights

        model = bench.model(subject)
        done, skipped = set(quantized_weights(model)), model.hf_quantizer.skipped
        assert done, "nothing was quantized"
        assert done == set(model.hf_quantizer.plan), "the plan and the model disagree"
        for name in set(find_weights(model)) - done:
            assert skipped.get(name), f"{name} is dense and no reason is given"
            assert "planned nothing" not in skipped[name], f"{name}: {skipped[name]}; return a Skip with the reason"

    def test_tensors_fit_their_layout(self, subject: Subject, bench: Workbench) -> None:
        """The parts of every quantized weight are those of its layout, with possible values."""
        for name, weight in quantized_weights(bench.model(subject)).items():
            try:
                weight.quant_layout.validate(weight.parts)
                weight.quant_layout.check_values(weight.parts)
            except LayoutError as error:
                raise AssertionError(f"{name}: {error}") from error

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
    def test_quantizing_gives_what_was_planned(self, config: int, dtype: torch.dtype, bench: Workbench) -> None:
        """qhub_quantize returns valid parts for each dtype, leaves the weight alone, and is better than nothing."""
        self._need_quantizing()
        generator = torch.Generator().manual_seed(0)
        for planned in self._planned(config, bench):
            layout = planned.layout
            shape = (layout.out_features, layout.in_features)
            weight = (_TYPICAL * torch.randn(shape, generator=generator)).to(dtype)
            found = self._quantize(config, weight, planned, bench)
            ratio = _sqnr(weight, found)
            floor = self.min_sqnr.get(config, 0.0) if dtype == torch.float32 else 0.0
            assert ratio > 0.0, f"{layout}: {ratio:.1f} dB, further from the weight than zero is"
            assert ratio >= floor, f"{layout}: {ratio:.2f} dB, the class asks for {floor} dB"

    @pytest.mark.parametrize("kind", ["zeros", "dead rows", "one outlier"])
    def test_odd_weights_stay_finite(self, config: int, kind: str, bench: Workbench) -> None:
        """Experts that never trained, dead rows, outliers: they give finite numbers, and zeros stay zeros."""
        self._need_quantizing()
        generator = torch.Generator().manual_seed(1)
        for planned in self._planned(config, bench):
            shape = (planned.layout.out_features, planned.layout.in_features)
            weight = _TYPICAL * torch.randn(shape, generator=generator)
            if kind == "zeros":
                weight.zero_()
            elif kind == "dead rows":
                weight[: shape[0] // 2] = 0.0
            else:
                weight[0, 0] = 50.0
            found = self._quantize(config, weight, planned, bench)
            assert bool(torch.isfinite(found).all()), (
                f"{planned.layout}: a weight with {kind} dequantizes to NaN or infinity"
            )
            if kind == "zeros":
                assert float(found.abs().max()) < _NOTHING, (
                    f"{planned.layout}: zeros dequantize to {float(found.abs().max())}"
                )

    def _need_quantizing(self) -> None:
        if not self.can_quantize:
            pytest.skip(f"{self.method} does not quantize")

    def _quantize(self, config: int, weight: Tensor, planned: LayerPlan, bench: Workbench) -> Tensor:
        statistics: dict[str, Tensor] = {}
        if planned.statistics:
            # What the engine gives for an expert that saw no token.
            statistics = neutral(planned.statistics, planned.layout.in_features, weight.device)
        given = {name: value.clone() for name, value in statistics.items()}
        before = weight.clone()
        parsed = bench.parse(bench.configs[config])
        with torch.no_grad():
            parts = Quantization(self.method, parsed).parts(weight, planned.layout, statistics)
        assert torch.equal(weight, before), "qhub_quantize wrote into the weight it was given"
        for name, value in given.items():
            # Layers with a common input get the same tensors.
            assert torch.equal(statistics[name], value), f"qhub_quantize wrote into the statistic {name!r}"
        try:
            planned.layout.validate(parts)
            planned.layout.check_values(parts)
        except LayoutError as error:
            raise AssertionError(f"qhub_quantize for {planned.layout}: {error}") from error
        for name, part in parts.items():
            assert part.device == weight.device, f"part {name!r} is on {part.device}, the weight on {weight.device}"
            assert not part.requires_grad, f"part {name!r} requires gradients"
        return planned.layout.dequantize(parts)


def _infos(model: Any) -> list[WeightInfo]:
    return list(model.hf_quantizer.planned_infos().values())


def _without_input_scale(layout: Layout) -> Layout:
    """Return ``layout`` without the leading input scale that the calibration engine adds."""
    if layout.transforms[:1] != (Transform("scale", "in"),):
        return layout
    return dataclasses.replace(layout, transforms=layout.transforms[1:])


def _sqnr(weight: Tensor, found: Tensor) -> float:
    """Return the signal-to-noise ratio of ``found`` in dB, in float64."""
    error = (found.double() - weight.double()).square().sum()
    return math.inf if float(error) == 0 else 10 * math.log10(float(weight.double().square().sum() / error))
