"""Checks that LoRA trains on the quantized model, merges into it and out of it, and that the result reloads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qhub.errors import UnsupportedError
from qhub.testing.conformance.models import INPUT
from qhub.testing.conformance.subject import KitBase, Subject
from qhub.testing.conformance.workbench import Workbench, quantized_weights

__all__ = ["AdapterChecks"]

_STEPS = 5


class AdapterChecks(KitBase):
    """Uses PEFT as a user does; skipped where it is not installed."""

    def _trained(self, single: Subject, bench: Workbench) -> tuple[Any, list[float]]:
        peft = pytest.importorskip("peft", reason="peft is not installed: pip install qhub-core[peft]")
        model = bench.load(bench.saved(single))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        trainable = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-2)
        losses = []
        for _ in range(_STEPS):
            loss = tuned(input_ids=INPUT, labels=INPUT).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            losses.append(float(tuned(input_ids=INPUT, labels=INPUT).loss))
        return tuned.eval(), losses

    def test_lora_trains(self, single: Subject, bench: Workbench) -> None:
        """Five steps on all linear layers: the loss falls, and no quantized weight moves."""
        before = {
            name.removesuffix(".weight"): weight.dequantize(torch.float32)
            for name, weight in quantized_weights(bench.model(single)).items()
        }
        tuned, losses = self._trained(single, bench)
        assert all(after < losses[0] for after in losses[1:]), f"the loss did not fall: {losses}"
        after = {
            name.removeprefix("base_model.model.").removesuffix(".weight").replace(".base_layer", ""): weight
            for name, weight in quantized_weights(tuned).items()
        }
        assert set(after) == set(before), "training changed which weights are quantized"
        moved = [name for name, one in after.items() if not torch.equal(one.dequantize(torch.float32), before[name])]
        assert not moved, f"training an adapter changed {moved}"

    def test_lora_unmerges_bit_by_bit(self, single: Subject, bench: Workbench) -> None:
        """merge_adapter changes codes or scales, and unmerge_adapter gives the very bits back."""
        tuned, _ = self._trained(single, bench)
        if {w.policy.refuse for w in quantized_weights(tuned).values()} - {None}:
            pytest.skip(f"{self.method} refuses merges")
        before = {name: weight.clone() for name, weight in quantized_weights(tuned).items()}
        expected = bench.logits(tuned)
        tuned.merge_adapter()
        assert any(not _same(weight, before[name]) for name, weight in quantized_weights(tuned).items())
        tuned.unmerge_adapter()
        changed = [name for name, weight in quantized_weights(tuned).items() if not _same(weight, before[name])]
        assert not changed, f"unmerging left other codes in {changed}"
        # Layers that the method leaves dense are unmerged by subtracting, which rounds.
        assert torch.allclose(bench.logits(tuned), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    def test_lora_merges_and_reloads(self, single: Subject, bench: Workbench) -> None:
        """merge_and_unload writes the adapter into the quantized weights; the logits survive saving and reloading."""
        tuned, losses = self._trained(single, bench)
        refusals = {w.policy.refuse for w in quantized_weights(tuned).values()} - {None}
        if refusals:
            with pytest.raises(UnsupportedError) as caught:
                tuned.merge_and_unload()
            assert any(str(reason) in str(caught.value) for reason in refusals), f"no reason given: {caught.value}"
            pytest.skip(f"{self.method} refuses merges, and says why: {sorted(map(str, refusals))}")
        names = {name.replace(".base_layer", "").removeprefix("base_model.model.") for name in quantized_weights(tuned)}
        merged = tuned.merge_and_unload()
        assert set(quantized_weights(merged)) == names, "merging left weights dense"
        with torch.no_grad():
            loss = float(merged(input_ids=INPUT, labels=INPUT).loss)
        # A merge rounds the update onto the grid; with nothing of it left, the loss would be the untrained one.
        assert loss < losses[0], f"the merge lost the training: {loss}, untrained {losses[0]}, adapter {losses[-1]}"
        expected = bench.logits(merged)
        folder = bench.folder("merged")
        merged.save_pretrained(folder)
        again = bench.load(folder)
        assert set(quantized_weights(again)) == names
        assert torch.equal(bench.logits(again), expected), "the merged model's logits change on the way through a file"


def _same(one: Any, other: Any) -> bool:
    # As bytes: torch compares no 8-bit floats.
    return all(torch.equal(_bytes(part), _bytes(other.parts[name])) for name, part in one.parts.items())


def _bytes(part: torch.Tensor) -> torch.Tensor:
    return part.detach().cpu().contiguous().view(-1).view(torch.uint8)
