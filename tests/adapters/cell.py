"""One cell of the matrix: what a tuner can do on one model, held against a dense twin of it.

A check raises where something is wrong. Whether peft itself can do it is found by the same check on a dense model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qhub.merging import merging_with
from qhub.tensor import QuantizedTensor
from qhub.testing.conformance.models import INPUT

from .bases import dense_twin
from .cases import Case, noise

__all__ = ["CHECKS", "Bits", "Cell", "UntestedError", "dense_values", "quantized", "randomize", "trained"]

# float32 products of up to K = 128 terms, summed in another order, differ by up to K * 2^-24 of the sum of magnitudes;
# an input passes some ten of them one after the other, adapters included.
ROUNDING = 10 * 128 * 2.0**-24
# An input that falls on the other side of the middle between two int8 codes moves by absmax / 127; it happens at few
# positions, two or three times in a row of layers.
STEP = 3 / 127
STEPS = 6


def quantized(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Return the quantized weights of ``model``, by names without what peft put into them."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in base.named_parameters()
        if isinstance(value, QuantizedTensor)
    }


def dense_values(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters of ``model``, by names without what peft put into them."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return {name.replace(".base_layer", ""): value.detach() for name, value in base.named_parameters()}


class Bits:
    """Remembers the codes of a model's quantized weights; the names may change when peft wraps it."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = quantized(model)
        self._before = {name: _copied(weight) for name, weight in self._weights.items()}

    def changed(self) -> list[str]:
        """Return the names of the weights whose codes are others now."""
        return [
            name
            for name, weight in self._weights.items()
            if any(not torch.equal(part, self._before[name][key]) for key, part in weight.parts.items())
        ]


def _copied(weight: QuantizedTensor) -> dict[str, Tensor]:
    return {key: part.clone() for key, part in weight.parts.items()}


class UntestedError(Exception):
    """Says that a case proves nothing: never an excuse."""


class Cell:
    """Runs the checks of ``case`` on what ``make`` returns, beside what ``twin`` returns; each call returns a copy."""

    def __init__(self, case: Case, make: Callable[[], nn.Module], twin: Callable[[], nn.Module], folder: Path) -> None:
        self.case = case
        self._make, self._twin = make, twin
        self._folder = folder
        weights = list(quantized(make()).values())
        self.dense = not weights
        rounds_input = any(weight.quant_layout.activation.kind != "none" for weight in weights)
        self.tolerance = STEP if rounds_input else ROUNDING

    # -- models ------------------------------------------------------------------------------------------------------

    def wrapped(self, base: nn.Module, change: int | None = 0) -> nn.Module:
        """Return ``base`` with a new adapter; ``change``: seed of a random change of it, None for its start."""
        torch.manual_seed(0)
        case = self.case
        config = case.config(base)
        case.prepare(base, config)
        model = peft.get_peft_model(base, config)
        case.finish(model)
        if change is not None:
            randomize(model, change)
        return model.eval()

    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits; a tuner that draws random numbers draws the same ones each time."""
        torch.manual_seed(1)
        with torch.no_grad():
            return model(**self._inputs()).logits

    def _inputs(self) -> dict[str, Tensor]:
        # Some tuners write into their inputs.
        return {name: value.clone() for name, value in self.case.inputs.items()}

    def near(self, found: Tensor, expected: Tensor, what: str, slack: float = 1.0) -> None:
        """Raise unless ``found`` is ``expected`` but for rounding."""
        assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        assert bool(torch.isfinite(found).all()), f"{what}: not finite"
        off = float((found - expected).abs().max())
        allowed = slack * self.tolerance * float(expected.abs().max())
        assert off <= allowed, f"{what}: off by {off:.3g}, rounding explains {allowed:.3g}"
        if self.tolerance == STEP and found.ndim == 3:
            middle = float((found - expected).abs().amax(-1).median())
            allowed = slack * ROUNDING * float(expected.abs().max())
            assert middle <= allowed, f"{what}: half of all positions are off by more than {middle:.3g}"

    def same(self, found: Tensor, expected: Tensor, what: str) -> None:
        """Raise unless ``found`` is ``expected`` bit by bit; but for rounding on a dense model, where peft promises
        no more."""
        if self.dense or self.case.drifts:
            self.near(found, expected, what)
        else:
            assert torch.equal(found, expected), f"{what} by {float((found - expected).abs().max()):.3g}"

    # -- checks ------------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """A changed adapter gives what it gives on the dense twin, and starts from the same numbers there."""
        model, twin = self._pair()
        expected = self.logits(twin)
        self.near(self.logits(model), expected, "logits against the dense model")
        with twin.disable_adapter():
            without = self._base_logits(twin)
        if without.shape == expected.shape:
            effect = float((expected - without).abs().max() / expected.abs().max())
            if effect <= 10 * ROUNDING:
                raise UntestedError(f"the adapter changes the logits by {effect:.1g} only: nothing was tested")

    def training(self) -> None:
        """Gradients are those of the dense twin, for every trained parameter; the loss falls; no code moves."""
        model, twin = self._pair()
        before = Bits(model)
        found, expected = self._gradients(model), self._gradients(twin)
        assert found, "nothing is trained"
        assert set(found) == set(expected), f"gradients for {sorted(set(found) ^ set(expected))} on one model only"
        largest = max(float(grad.abs().max()) for grad in expected.values())
        assert largest > 0, "all gradients are zero"
        for name, grad in expected.items():
            # Beside the largest number of all: what is zero but for rounding has no relative error of its own.
            off = float((found[name] - grad).abs().max())
            allowed = 10 * self.tolerance * max(float(grad.abs().max()), 1e-2 * largest)
            assert off <= allowed, f"gradient of {name}: off by {off:.3g}, rounding explains {allowed:.3g}"
        losses = self._losses(model)
        assert losses[-1] < losses[0], f"the loss did not fall: {losses}"
        assert not before.changed(), f"training moved {before.changed()}"

    def saving(self) -> None:
        """A saved adapter gives the same logits on a new copy of the base, and on the dense twin in plain peft."""
        model = self.wrapped(self._make())
        expected = self.logits(model)
        folder = self._folder / "saved"
        model.save_pretrained(folder)
        again = self._loaded(self._make(), folder)
        self.same(self.logits(again), expected, "loading the adapter changes the logits")
        if not self.case.moves_base:
            on_twin = self._loaded(self._twin(), folder)
            self.near(self.logits(on_twin), expected, "logits of the adapter on the dense model")

    def _loaded(self, base: nn.Module, folder: Path) -> nn.Module:
        if not self.case.moves_base:
            self.case.prepare(base, None)
        return peft.PeftModel.from_pretrained(base, folder).eval()

    def switching(self) -> None:
        """A second adapter is added, and both are switched to and fro."""
        model = self.wrapped(self._make())
        first = self.logits(model)
        self._add_second(model)
        model.set_adapter("second")
        second = self.logits(model.eval())
        assert not torch.allclose(first, second, rtol=0, atol=float(first.abs().max()) * ROUNDING), "both do the same"
        model.set_adapter("default")
        self.same(self.logits(model), first, "switching to another adapter and back changes the logits")
        if not self.case.moves_base:
            twin = self.wrapped(self._twin())
            self._add_second(twin)
            twin.set_adapter("second")
            self.near(second, self.logits(twin.eval()), "logits of the second adapter")

    def disabling(self) -> None:
        """Without its adapter the model gives the base's logits, bit by bit."""
        base = self._make()
        before = Bits(base)
        expected = self._base_logits(base)
        model = self.wrapped(base)
        with model.disable_adapter():
            found = self._base_logits(model)
        assert torch.equal(found, expected), f"off by {float((found - expected).abs().max()):.3g} with it disabled"
        assert not before.changed(), f"disabling changed {before.changed()}"

    def merging(self) -> None:
        """merge_adapter leaves all weights quantized; unmerge_adapter gives the very bits back."""
        model = self.wrapped(self._make())
        names, before, expected = set(quantized(model)), Bits(model), self.logits(model)
        with merging_with(samples=0):
            model.merge_adapter()
        merged = self.logits(model)
        assert bool(torch.isfinite(merged).all()), "not finite when merged"
        assert set(quantized(model)) == names, "merging left weights dense"
        if self.dense:
            self.near(merged, expected, "merged", 10)
        model.unmerge_adapter()
        assert not before.changed(), f"unmerging gives other codes for {before.changed()}"
        after = self.logits(model)
        if self.dense:
            self.near(after, expected, "unmerged", 10)
        else:
            assert torch.equal(after, expected), "other logits after unmerging"

    def unloading(self) -> None:
        """merge_and_unload leaves a quantized model with no trace of the tuner, as near as requantizing can come."""
        self._unload(safe=False)

    def unloading_safely(self) -> None:
        """merge_and_unload(safe_merge=True) does the same."""
        self._unload(safe=True)

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _pair(self) -> tuple[nn.Module, nn.Module]:
        """Return the model and its twin with one and the same changed adapter."""
        model = self.wrapped(self._make(), change=None)
        if self.case.moves_base:
            self._judge_start(model)
            twin = dense_twin(model)
        else:
            twin = self.wrapped(self._twin(), change=None)
            start, reference = trained(model), trained(twin)
            assert set(start) == set(reference), f"trains {sorted(set(start) ^ set(reference))} on one model only"
            for name, value in reference.items():
                self.near(start[name].detach(), value.detach(), f"start of {name}")
        for one in (model, twin):
            randomize(one, 0)
        return model.eval(), twin.eval()

    def _add_second(self, model: nn.Module) -> None:
        torch.manual_seed(5)
        config = self.case.config(model.get_base_model())
        self.case.prepare(model.get_base_model(), config)
        model.add_adapter("second", config)
        randomize(model, 3, "second")

    def _base_logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(self.case.inputs["input_ids"]).logits

    def _gradients(self, model: nn.Module) -> dict[str, Tensor]:
        model.train()
        torch.manual_seed(2)
        model(**self._inputs(), labels=INPUT.clone()).loss.backward()
        return {name: p.grad for name, p in trained(model).items() if p.grad is not None}

    def _losses(self, model: nn.Module) -> list[float]:
        optimizer = torch.optim.Adam(trained(model).values(), lr=self.case.rate)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            torch.manual_seed(2)
            loss = model(**self._inputs(), labels=INPUT.clone()).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def _unload(self, safe: bool) -> None:
        model = self.wrapped(self._make())
        # What is left of the base after the tuner's start: the merge is judged from there.
        before = {name: copy.deepcopy(weight) for name, weight in quantized(model).items()}
        target = dense_twin(model)
        with merging_with(samples=0):
            merged = model.merge_and_unload(safe_merge=safe)
        leftovers = [name for name, module in merged.named_modules() if isinstance(module, BaseTunerLayer)]
        assert not leftovers, f"layers of the tuner are left: {leftovers}"
        logits = self._base_logits(merged)
        assert bool(torch.isfinite(logits).all()), "not finite"
        now = quantized(merged)
        assert set(now) == set(before), f"other weights are quantized: {sorted(set(now) ^ set(before))}"
        expected = target.merge_and_unload(safe_merge=safe)
        if self.dense:
            self.near(logits, self.logits(self.wrapped(self._make())), "merged", 10)
        wanted = dense_values(expected)
        for name, weight in now.items():
            self._judge(name, weight, wanted[name], before[name])

    def _judge_start(self, model: nn.Module) -> None:
        """Raise if what the tuner left of the base is not what it leaves on the twin, requantized once."""
        wanted = dense_values(self.wrapped(self._twin(), change=None))
        before = quantized(self._make())
        for name, weight in quantized(model).items():
            self._judge(name, weight, wanted[name], before[name])

    def _judge(self, name: str, weight: QuantizedTensor, target: Tensor, before: QuantizedTensor) -> None:
        """Raise if ``weight`` is farther from ``target`` than codes picked under the scales of ``before`` are."""
        layout = before.quant_layout
        dense = target.transpose(-1, -2) if before.transposed else target
        kept = layout.dequantize(layout.requantize(dense, before.parts, "keep"))
        cost = float((kept - dense).norm())
        off = float((weight.dequantize(torch.float32) - target).norm())
        rounding = ROUNDING * float(target.norm())
        assert off <= cost * 1.001 + rounding, (
            f"{name}: {off:.3g} from its target, while codes picked on the old grid are {cost:.3g} from it"
        )


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomize(model: nn.Module, seed: int, adapter: str | None = None) -> None:
    """Change every trained parameter a little; with ``adapter`` those that belong to it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            mine = parameter.requires_grad if adapter is None else f".{adapter}" in name
            if mine and parameter.is_floating_point() and not isinstance(parameter, QuantizedTensor):
                parameter.add_(noise(parameter, generator))


CHECKS: dict[str, Callable[[Cell], None]] = {
    "forward": Cell.forward,
    "training": Cell.training,
    "saving": Cell.saving,
    "switching": Cell.switching,
    "disabling": Cell.disabling,
    "merging": Cell.merging,
    "unloading": Cell.unloading,
    "unloading safely": Cell.unloading_safely,
}
