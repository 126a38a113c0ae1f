"""Several adapters at once, and PEFT's other ways in: weighted sums, mixed batches, transformers' own calls, k-bit."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from qhub.errors import UnsupportedError
from qhub.merging import merging_with
from qhub.testing.conformance.models import INPUT

from .bases import Bases
from .cases import TARGETS
from .cell import ROUNDING, Bits, dense_values, quantized, randomize

COLUMN = "gptq 4-bit act-order"


def _lora(**values: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": list(TARGETS), **values})  # type: ignore[arg-type]


def _logits(model: nn.Module, tokens: Tensor = INPUT, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **kwargs).logits


def _near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


def _two(base: nn.Module, second: peft.PeftConfig | None = None, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(base, _lora(), **kwargs)  # type: ignore[arg-type]
    randomize(model, 0, "default")
    model.add_adapter("second", second or _lora(r=2))
    randomize(model, 1, "second")
    return model.eval()


def test_two_active_adapters_add_up_and_merge_together(bases: Bases) -> None:
    model, twin = _two(bases.quantized(COLUMN)), _two(bases.twin(COLUMN))
    for one in (model, twin):
        one.base_model.set_adapter(["default", "second"])
    expected = _logits(twin)
    _near(_logits(model), expected)
    before = Bits(model)
    with merging_with(samples=0):
        model.merge_adapter()
    target = twin.merge_and_unload()
    weights, wanted = quantized(model), dense_values(target)
    moved = [name for name in before.changed() if not torch.equal(weights[name].dequantize(), wanted[name])]
    assert moved, "nothing was merged"
    for name in moved:
        weight = weights[name]
        off = float((weight.dequantize() - wanted[name]).norm())
        layout = weight.quant_layout
        kept = layout.dequantize(layout.requantize(wanted[name], before._before[name], "keep"))
        assert off <= 1.001 * float((kept - wanted[name]).norm()), name
    model.unmerge_adapter()
    assert not before.changed()


def test_a_weighted_sum_of_adapters(bases: Bases) -> None:
    found = []
    for base in (bases.quantized(COLUMN), bases.twin(COLUMN)):
        model = _two(base, _lora())
        model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", combination_type="linear")
        model.set_adapter("sum")
        found.append(_logits(model))
    _near(found[0], found[1])


def test_a_batch_with_another_adapter_per_sample(bases: Bases) -> None:
    model = _two(bases.quantized(COLUMN))
    batch = INPUT.repeat(3, 1)
    mixed = _logits(model, batch, adapter_names=["second", "__base__", "default"])
    for row, name in enumerate(("second", None, "default")):
        if name is None:
            with model.disable_adapter():
                alone = _logits(model)
        else:
            model.set_adapter(name)
            alone = _logits(model)
        _near(mixed[row : row + 1], alone)


def test_tuners_of_two_kinds_on_one_model(bases: Bases) -> None:
    found = []
    for base in (bases.quantized(COLUMN), bases.twin(COLUMN)):
        model = _two(base, peft.LoHaConfig(r=2, target_modules=list(TARGETS)), mixed=True)
        model.set_adapter(["default", "second"])
        found.append(_logits(model))
    _near(found[0], found[1])


def test_adapters_through_transformers_own_calls(bases: Bases, tmp_path: Path) -> None:
    model = bases.quantized(COLUMN)
    base = _logits(model)
    torch.manual_seed(0)
    model.add_adapter(_lora())
    randomize(model, 0, "default")
    model.eval()
    expected = _logits(model)
    assert not torch.equal(expected, base)
    model.disable_adapters()
    assert torch.equal(_logits(model), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    for target, same in ((bases.quantized(COLUMN), True), (bases.twin(COLUMN), False)):
        target.load_adapter(str(tmp_path))
        found = _logits(target.eval())
        assert torch.equal(found, expected) if same else _near(found, expected) is None


def test_loading_in_the_empty_way(bases: Bases, tmp_path: Path) -> None:
    model = _two(bases.quantized(COLUMN))
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bases.quantized(COLUMN), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(_logits(again), _logits(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_preparing_for_training_leaves_quantized_weights_alone(bases: Bases, reentrant: bool) -> None:
    model = bases.quantized(COLUMN)
    before, dtypes = Bits(model), {name: parameter.dtype for name, parameter in model.named_parameters()}
    prepared = peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert prepared is model and model.is_gradient_checkpointing
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
    assert quantized(model) and not any(parameter.requires_grad for parameter in model.parameters())
    gradients = []
    for one in (prepared, bases.quantized(COLUMN)):
        torch.manual_seed(0)
        tuned = peft.get_peft_model(one, _lora())
        randomize(tuned, 0)
        tuned.train()
        tuned(input_ids=INPUT, labels=INPUT).loss.backward()
        gradients.append({name: p.grad for name, p in tuned.named_parameters() if p.requires_grad})
    assert gradients[0] and set(gradients[0]) == set(gradients[1])
    for name, grad in gradients[0].items():
        assert grad is not None, f"gradient checkpointing lost the gradient of {name}"
        _near(grad, gradients[1][name])
    assert not before.changed()


def test_quantized_weights_are_not_trained_themselves(bases: Bases) -> None:
    model = bases.quantized(COLUMN)
    weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(UnsupportedError, match="cannot require gradients.*adapter"):
        weight.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="cannot require gradients.*adapter"):
        model.model.layers[0].self_attn.q_proj.requires_grad_(True)


def test_an_adapter_of_other_shapes_is_refused_and_changes_nothing(bases: Bases, tmp_path: Path) -> None:
    other = peft.get_peft_model(bases.quantized("aqlm 2x8"), _lora())
    other.save_pretrained(tmp_path / "other")
    model = bases.quantized(COLUMN)
    before, expected = Bits(model), _logits(model)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*q_proj\.lora_A"):
        peft.PeftModel.from_pretrained(model, tmp_path / "other")
    assert not before.changed()
    # With an adapter there already: it stays as it is.
    tuned = _two(bases.quantized(COLUMN))
    tuned.set_adapter("default")
    before, expected = Bits(tuned), _logits(tuned)
    kept = {name: copy.deepcopy(p) for name, p in tuned.named_parameters() if ".default." in name}
    with pytest.raises(RuntimeError, match="size mismatch"):
        tuned.load_adapter(tmp_path / "other", "third")
    assert not before.changed()
    assert all(torch.equal(p, kept[name]) for name, p in tuned.named_parameters() if name in kept)
    tuned.set_adapter("default")
    assert torch.equal(_logits(tuned), expected)


def test_layers_that_share_a_weight_are_unmerged_exactly(bases: Bases) -> None:
    model = peft.get_peft_model(bases.quantized(COLUMN), _lora(layer_replication=[[0, 1], [0, 1]]))
    randomize(model, 0)
    before, expected = Bits(model), _logits(model.eval())
    with merging_with(samples=0):
        model.merge_adapter()
    assert before.changed()
    model.unmerge_adapter()
    assert not before.changed()
    assert torch.equal(_logits(model), expected)


def test_a_tuner_that_merges_into_biases_does_so_in_16_bits(bases: Bases) -> None:
    found = []
    for base in (bases.quantized(COLUMN, "opt"), bases.twin(COLUMN, "opt")):
        base.to(torch.bfloat16)
        model = peft.get_peft_model(base, peft.RoadConfig(target_modules=["fc1", "fc2"], group_size=16))
        randomize(model, 0)
        with merging_with(samples=0):
            merged = model.merge_and_unload()
        found.append({n: p for n, p in merged.named_parameters() if n.endswith(("fc1.bias", "fc2.bias"))})
    assert len(found[0]) == 2
    for name, bias in found[0].items():
        assert bias.dtype == torch.bfloat16
        torch.testing.assert_close(bias, found[1][name], rtol=2.0**-6, atol=2.0**-7)
