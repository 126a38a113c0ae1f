"""Merging through PEFT's own calls, and through qhub.merge: what is kept, what is refused, what is reported."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import qhub
from qhub.errors import CheckpointError, ConfigError, UnsupportedError
from qhub.evaluate import kl_divergence
from qhub.merging import merging_with
from qhub.tensor import QuantizedTensor


def _codes(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name.replace(".base_layer", "").replace("base_model.model.", ""): {
            part: tensor.clone() for part, tensor in parameter.parts.items()
        }
        for name, parameter in model.named_parameters()
        if isinstance(parameter, QuantizedTensor)
    }


def _same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name][part], other[name][part]) for name in one for part in one[name]
    )


@pytest.mark.parametrize("name", ["nf4", "int8", "hqq4", "hqq3"])
def test_merged_predictions_stay_near_the_adapters(cases: Any, name: str) -> None:
    """Most of what the adapter did is left, the report says how much, and the weights stay quantized."""
    case = cases(name)
    model = case.fresh()
    on_top = case.logits(model)
    with model.disable_adapter():
        without = case.logits(model)
    merged = model.merge_and_unload()
    kl = float(kl_divergence(on_top, case.logits(merged)).mean())
    there_was = float(kl_divergence(on_top, without).mean())
    assert kl < {"nf4": 0.25, "int8": 0.05, "hqq4": 0.25, "hqq3": 0.5}[name] * there_was
    report = merged.qhub_merge_report
    assert len(report.layers) == 28 and report.adapters == ["default"] and report.tokens == 16 * 32
    assert report.kl is not None and report.kl_without is not None and report.kl < report.kl_without
    assert all(layer.error <= layer.update * 1.0001 for layer in report.layers)
    assert f"KL from adapter on top {report.kl:.4f}" in report.summary()
    assert len(_codes(merged)) == 28


def test_unmerging_gives_the_very_bits_back(cases: Any) -> None:
    """merge_adapter and unmerge_adapter leave codes, logits and a second merge as they were."""
    case = cases("nf4")
    model = case.fresh()
    before, on_top = _codes(model), case.logits(model)
    model.merge_adapter()
    merged = case.logits(model)
    assert not _same(_codes(model), before)
    model.unmerge_adapter()
    assert _same(_codes(model), before)
    assert torch.equal(case.logits(model), on_top)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(case.logits(model), merged)
    # Switching adapters off takes them out as well, as it does in PEFT.
    with model.disable_adapter():
        case.logits(model)
        assert _same(_codes(model), before)


def test_several_adapters_are_rounded_once(cases: Any) -> None:
    """Two merged together land on the sum of both: not rounded after the first."""
    import peft

    case = cases("hqq4")
    model = case.fresh()
    torch.manual_seed(1)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    dense = layer.base_layer.weight.dequantize(torch.float32)
    target = dense + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    with merging_with(samples=0, grid="keep"):
        model.merge_adapter(["default", "other"])
    weight = layer.base_layer.weight
    expected = case.fresh().base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    rounded = expected.quant_layout.requantize(target, expected.parts, "keep")
    assert torch.equal(weight.parts["qweight"], rounded["qweight"])
    assert layer.merged_adapters == ["default", "other"]
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.dequantize(torch.float32), dense)


def test_merging_twice_is_refused_before_anything_changes(cases: Any) -> None:
    """On top of itself, after unloading, and into weights that hold it already, saved and loaded in between."""
    import peft

    case = cases("int8")
    model = case.fresh()
    model.merge_adapter()
    codes = _codes(model)
    with pytest.raises(UnsupportedError, match="'default' is merged already: nothing was changed"):
        model.merge_adapter()
    assert _same(_codes(model), codes)
    merged = model.merge_and_unload()
    assert "merged before this call" in merged.qhub_merge_report.summary()
    with pytest.raises(UnsupportedError, match="merged and unloaded already"):
        model.merge_and_unload()
    codes = _codes(merged)
    again = peft.PeftModel.from_pretrained(merged, case.adapter)
    with pytest.raises(UnsupportedError, match="merged into these weights before"):
        again.merge_and_unload()
    assert _same(_codes(again), codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_refused_before_anything_changes(cases: Any, value: float) -> None:
    """NaN in the last layer: no layer is merged, by either call, and the layer is named."""
    case = cases("nf4")
    model = case.fresh()
    codes = _codes(model)
    model.base_model.model.model.layers[3].mlp.down_proj.lora_A["default"].weight.data[0, 0] = value
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            UnsupportedError, match=r"holds NaN or infinity in lora_A of model\.layers\.3\.mlp\.down_proj"
        ):
            call()
        assert _same(_codes(model), codes)
        assert not any(getattr(module, "merged", False) for module in model.modules())


def test_an_overflow_that_only_the_sum_shows_changes_nothing(cases: Any) -> None:
    """Finite factors whose product is infinite: the layers merged before it are taken back."""
    case = cases("nf4")
    model = case.fresh()
    codes = _codes(model)
    layer = model.base_model.model.model.layers[2].mlp.up_proj
    layer.lora_A["default"].weight.data[:] = 3e30
    layer.lora_B["default"].weight.data[:] = 3e30
    with merging_with(samples=0), pytest.raises(UnsupportedError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        model.merge_adapter()
    assert _same(_codes(model), codes)
    assert not any(getattr(module, "merged", False) for module in model.modules())


def test_a_method_that_refuses_says_why_before_anything_changes(cases: Any) -> None:
    """The reason of the policy is in the error, and the weight's name."""
    case = cases("nf4")
    model = case.fresh()
    weight = model.base_model.model.model.layers[3].mlp.down_proj.base_layer.weight
    weight.policy = type(weight.policy)(refuse="its codes come from a sealed book")
    codes = _codes(model)
    with pytest.raises(UnsupportedError, match=r"layers\.3\.mlp\.down_proj\.weight: its codes come from a sealed book"):
        model.merge_and_unload()
    assert _same(_codes(model), codes)


def test_one_layer_by_itself_merges_and_unmerges(cases: Any) -> None:
    """A tuner layer's own merge works without a model around it: rounded to nearest, and taken back exactly."""
    case = cases("nf4")
    model = case.fresh()
    layer = model.base_model.model.model.layers[1].mlp.gate_proj
    before = {name: part.clone() for name, part in layer.base_layer.weight.parts.items()}
    target = layer.base_layer.weight.dequantize(torch.float32) + layer.get_delta_weight("default")
    layer.merge()
    off = (layer.base_layer.weight.dequantize(torch.float32) - target).detach()
    assert float(off.norm() / target.detach().norm()) < 0.11
    layer.unmerge()
    assert all(torch.equal(layer.base_layer.weight.parts[name], part) for name, part in before.items())


def test_biases_come_back_too() -> None:
    """A LoRA with a bias of its own changes the layer's; unmerging restores its bits."""
    import peft
    from transformers import BitsAndBytesConfig, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64, vocab_size=128,
        num_hidden_layers=1, num_attention_heads=4,
    )  # fmt: skip
    base = OPTForCausalLM(config)
    base = qhub.quantize(base, BitsAndBytesConfig(load_in_4bit=True))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["fc1"], lora_bias=True, init_lora_weights=False))
    layer = model.base_model.model.model.decoder.layers[0].fc1
    bias = layer.base_layer.bias.detach().clone()
    torch.nn.init.normal_(layer.lora_B["default"].bias)
    model.merge_adapter()
    assert not torch.equal(layer.base_layer.bias, bias)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)


def test_options_hold_for_peft_s_own_calls(cases: Any) -> None:
    """The grid that is asked for is the one that is taken; data of one's own are used; none are measured on request."""
    case = cases("hqq3")
    with merging_with(grid="keep"):
        kept = case.fresh().merge_and_unload()
    assert {layer.grid for layer in kept.qhub_merge_report.layers} == {"keep"}
    merged = qhub.merge(case.fresh(), grid="refit", data=[case.tokens[0].tolist()], length=128)
    report = merged.qhub_merge_report
    assert {layer.grid for layer in report.layers} == {"refit"} and report.tokens == 128
    unmeasured = qhub.merge(case.fresh(), samples=0).qhub_merge_report
    assert unmeasured.kl is None and "0 samples" in unmeasured.summary()
    assert not any(layer.spread for layer in unmeasured.layers)
    with pytest.raises(ConfigError, match="grid='nearest'"):
        qhub.merge(case.fresh(), grid="nearest")


def test_dense_models_are_peft_s_own_business(doclm: Any) -> None:
    """Nothing is measured, reported or refused on a model without quantized weights."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(doclm, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight.data + layer.get_delta_weight("default")
    adapted.merge_adapter()
    assert torch.equal(layer.base_layer.weight.data, expected)
    merged = adapted.merge_and_unload()
    assert not hasattr(merged, "qhub_merge_report") and not hasattr(merged.config, "merged_adapters")


def test_a_wrong_adapter_is_one_clear_error(cases: Any, tmp_path: Any) -> None:
    """Of other shapes, or no adapter at all: named, and the model is as it was."""
    from safetensors.torch import load_file, save_file

    case = cases("nf4")
    model = copy.deepcopy(case.fresh().unload())
    codes = _codes(model)
    with pytest.raises(CheckpointError, match="nowhere"):
        qhub.merge(model, tmp_path / "nowhere")
    other = tmp_path / "other"
    case.fresh().save_pretrained(other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: t[:, :-2].contiguous() if "lora_A" in name else t for name, t in tensors.items()},
              other / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match="size mismatch"):
        qhub.merge(model, other)
    assert _same(_codes(model), codes)


def test_models_that_write_no_text_are_measured_on_random_tokens() -> None:
    """An encoder and an encoder-decoder: said in the report, with KL of what they predict, and errors spread."""
    import peft
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BitsAndBytesConfig,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    small = {"vocab_size": 100, "num_layers": 2, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5Config(d_model=64, d_kv=16, d_ff=128, decoder_start_token_id=0, **small))
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    )
    for model, targets in ((t5, ["q", "v", "wo"]), (bert, ["query", "value"])):
        quantized = qhub.quantize(model, BitsAndBytesConfig(load_in_4bit=True))
        adapted = peft.get_peft_model(
            quantized, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, bias="none")
        )
        report = adapted.merge_and_unload().qhub_merge_report
        assert "random tokens" in report.summary()
        assert report.kl is not None and report.kl_without is not None and report.kl < report.kl_without
        assert all(layer.rows > 0 for layer in report.layers)
