"""prepare, some text, finalize_calibration, convert; in one process or two, with adapters before or after."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from qhub_fp8.inc import FP8Config, convert, finalize_calibration, prepare
from transformers import AutoModelForCausalLM

from qhub import QuantizedTensor
from qhub.errors import CheckpointError, ConfigError
from qhub.modules import QuantLinear


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def near(a, b, tolerance=0.25):
    """Weights and inputs rounded to 2.6 %, through a few layers of a random model: 0.1 to 0.15 was measured."""
    return float((a - b).norm() / b.norm()) < tolerance


@pytest.fixture
def config(tmp_path):
    def make(**values):
        return FP8Config(dump_stats_path=str(tmp_path / "stats" / "measure"), **values)

    return make


def quantized(model):
    return {name for name, value in model.named_parameters() if isinstance(value, QuantizedTensor)}


def test_one_process(llama, config, ids, tmp_path):
    model = llama()
    before = logits(model, ids)
    largest = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(
                lambda m, a, name=name: largest.update({name: max(largest.get(name, 0.0), float(a[0].abs().max()))})
            )
    model = prepare(model, config(scale_method="maxabs_arbitrary", hp_dtype="fp32"))
    assert torch.equal(logits(model, ids[:1]), before[:1]) and torch.equal(logits(model, ids), before)
    finalize_calibration(model)
    assert torch.equal(logits(model, ids), before)
    model = convert(model)
    assert near(logits(model, ids), before)
    assert not torch.equal(logits(model, ids), before)
    assert quantized(model) and "lm_head.weight" not in quantized(model)
    for name in quantized(model):
        scale = float(model.get_parameter(name).parts["input_scale"])
        assert scale == pytest.approx(largest[name.removesuffix(".weight")] / 60, rel=1e-6), name
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.quantization_config.mode == "LOAD"
    # Elsewhere it would be taken for a quantized one.
    assert again.config.quantization_config.blocked("lm_head", "Linear")
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_two_processes(llama, config, ids, tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    first = config(mode="MEASURE")
    model = prepare(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), first)
    logits(model, ids)
    finalize_calibration(model)
    with pytest.raises(ConfigError, match="only measures"):
        convert(model)
    program = f"""
import torch
from transformers import AutoModelForCausalLM
from qhub_fp8.inc import FP8Config, convert
config = FP8Config.from_dict({{**{first.to_dict()!r}, "mode": "QUANTIZE"}})
convert(AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r}), config).save_pretrained(
    {str(tmp_path / "out")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    one = prepare(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), config())
    logits(one, ids)
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(two, ids), logits(convert(one), ids))


def test_from_pretrained_calibrates_by_itself(llama, config, ids, tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    data = [{"input_ids": one[None]} for one in ids]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config(dataset=data))
    assert near(logits(model, ids), logits(llama(), ids))
    plain = {"quant_method": "inc", "scale_method": "unit_scale", "blocklist": {"names": ["mlp"], "types": []}}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=plain)
    assert quantized(model) and not any("mlp" in name for name in quantized(model))


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({}, 14),
        ({"blocklist": {"names": ["lm_head", "layers.0"], "types": []}}, 7),
        ({"blocklist": {"names": ["[kq]_proj"]}}, 10),
        ({"allowlist": {"names": ["mlp"], "types": []}}, 6),
        ({"allowlist": {"names": [], "types": ["Linear"]}}, 14),
        ({"allowlist": {"names": ["lm_head", "o_proj"]}}, 3),
    ],
)
def test_lists_by_name_and_type(llama, config, ids, lists, expected):
    model = prepare(llama(), config(scale_method="maxabs_pow2", **lists))
    logits(model, ids)
    assert len(quantized(convert(model))) == expected


def test_a_type_on_the_blocklist_leaves_nothing(llama, config):
    with pytest.raises(ConfigError, match="blocklist"):
        prepare(llama(), config(blocklist={"names": [], "types": ["Linear"]}))


def test_a_mixture_of_experts(mixtral, config, ids, tmp_path):
    before = logits(mixtral(), ids)
    model = prepare(mixtral(), config())
    logits(model, ids)
    finalize_calibration(model)
    nodes = json.loads((tmp_path / "stats" / "measure_hooks_maxabs.json").read_text())["Nodes"]
    assert sum(".experts.down_proj." in name for name in nodes) == 4
    model = convert(model)
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, QuantizedTensor)
    assert near(logits(model, ids), before, 0.4)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), logits(model, ids))


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_are_trained_merged_and_unmerged(llama, config, ids, tmp_path, when, dora):
    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=dora)
    model = llama()
    if when == "before":
        model = get_peft_model(model, settings)
    model = prepare(model, config(scale_method="maxabs_pow2"))
    dense = logits(model, ids)
    finalize_calibration(model)
    model = convert(model)
    if when == "after":
        model = get_peft_model(model, settings)
    else:
        assert near(logits(model, ids), dense, 0.4)
    assert not any("lora_" in name for name in quantized(model))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.get_base_layer(), QuantLinear)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    before = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_adapter()
    assert near(logits(model, ids), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), before)
    merged = model.merge_and_unload()
    after = logits(merged, ids)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), after)


def test_an_adapter_is_loaded_on_a_converted_model(llama, config, ids, tmp_path):
    torch.manual_seed(1)
    get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path / "adapter"
    )
    model = prepare(llama(), config())
    logits(model, ids)
    convert(model).save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = logits(loaded, ids)
    adapted = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert not torch.equal(logits(adapted, ids), plain)


def test_a_copy_may_be_prepared_and_converted(llama, config, ids):
    model = llama()
    prepared = prepare(model, config(), inplace=False)
    logits(prepared, ids)
    converted = convert(prepared, inplace=False)
    assert quantized(converted) and not quantized(prepared) and not quantized(model)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_steps_out_of_order(llama, config, ids):
    model = llama()
    with pytest.raises(ConfigError, match="not prepared"):
        finalize_calibration(model)
    with pytest.raises(ConfigError, match="not prepared"):
        convert(model)
    with pytest.raises(ConfigError, match="prepare measures"):
        prepare(model, config(mode="QUANTIZE"))
    prepare(model, config())
    with pytest.raises(ConfigError, match="prepared already"):
        prepare(model, config())
    with pytest.raises(ConfigError, match="never run"):
        finalize_calibration(model)


def test_measurements_that_are_not_there_or_damaged(llama, config, ids, tmp_path):
    with pytest.raises(ConfigError, match="no measurements in"):
        convert(llama(), config(mode="QUANTIZE"))
    model = prepare(llama(), config())
    logits(model, ids)
    finalize_calibration(model)
    file = tmp_path / "stats" / "measure_hooks_maxabs.json"
    whole = json.loads(file.read_text())
    del whole["Nodes"]["model.layers.1.mlp.up_proj"]
    file.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj"):
        convert(llama(), config(mode="QUANTIZE"))
    model = convert(llama(), config(mode="QUANTIZE", ignore_modules_wo_measures=True))
    assert len(quantized(model)) == 13
    for bad in ("[]", '{"Nodes": {"a": {"inputs": []}}}', '{"Nodes": {"a": {"inputs": [[[-1.0]]]}}}', "{"):
        file.write_text(bad)
        with pytest.raises(CheckpointError, match="measure"):
            convert(llama(), config(mode="QUANTIZE"))


def test_a_model_that_overflows_is_named(llama, config, ids):
    model = llama()
    model.model.layers[1].input_layernorm.weight.data.fill_(float("inf"))
    prepare(model, config())
    logits(model, ids)
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        finalize_calibration(model)
