"""from_pretrained, save_pretrained and dequantize on every kind of architecture, with a method that the core has never
heard of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from qhub import QuantizedTensor, QuantLinear
from qhub.errors import ConfigError

ARCHITECTURES = ["llama", "llama-tied", "opt", "gpt2", "mixtral", "qwen3-moe"]
IDS = torch.arange(1, 10)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def keys(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= set(opened.keys())
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantize_save_reload_is_bit_identical(architecture, tiny, pow2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny(architecture), quantization_config={"quant_method": pow2})
    quantized = {name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    assert quantized == set(model.hf_quantizer.plan)
    assert quantized
    expected = logits(model)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for folder in ("one", "many"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert {name for name, p in again.named_parameters() if isinstance(p, QuantizedTensor)} == quantized
        assert torch.equal(logits(again), expected)
    assert keys(tmp_path / "one") == keys(tmp_path / "many")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dequantize_gives_plain_layers_and_the_same_logits(architecture, tiny, pow2):
    model = AutoModelForCausalLM.from_pretrained(tiny(architecture), quantization_config={"quant_method": pow2})
    expected = logits(model)
    model.dequantize()
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    assert not getattr(model.config, "quantization_config", None)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_experts_are_quantized_and_written_one_by_one(tiny, pow2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), quantization_config={"quant_method": pow2})
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, QuantizedTensor)
    assert experts.gate_up_proj.shape == (4, 192, 64)
    model.save_pretrained(tmp_path)
    written = keys(tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.3.w1.pow2_codes" in written
    assert "model.layers.0.block_sparse_moe.experts.0.w3.pow2_scales" in written
    weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    # 4-bit codes, one float32 scale per 32 weights, a table of 16 float32 per tensor.
    assert sum(p.nbytes for p in weights) == sum(p.numel() for p in weights) * 5 // 8 + 64 * len(weights)
    others = sum(p.numel() * 4 for p in model.parameters() if not isinstance(p, QuantizedTensor))
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert model.get_memory_footprint() == sum(p.nbytes for p in weights) + others + buffers


def test_experts_run_per_expert_on_the_quantized_tensor(tiny, pow2):
    """The fused weight is never dequantized whole: each expert that is hit takes its own matrix to the kernels."""
    from qhub.kernels import linear as module

    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3-moe"), quantization_config={"quant_method": pow2})
    shapes = []
    original = module._forward

    def spy(x, layout, parts, bias, memo=None):
        shapes.append((layout.out_features, layout.in_features))
        return original(x, layout, parts, bias, memo)

    module._forward = spy
    try:
        logits(model)
    finally:
        module._forward = original
    assert (128, 64) in shapes and (64, 64) in shapes


def test_tied_output_head_stays_tied_and_dense(tiny, pow2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama-tied"), quantization_config={"quant_method": pow2})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in keys(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_modules_to_not_convert(tiny, pow2, tmp_path):
    config = {"quant_method": pow2, "modules_to_not_convert": ["lm_head", "q_proj", "model.layers.1"]}
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config)
    assert set(model.hf_quantizer.plan) == {
        f"model.layers.0.{name}.weight"
        for name in (
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    assert "listed in modules_to_not_convert" in model.hf_quantizer.skipped["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_output_head_is_quantized_on_request(tiny, pow2, tmp_path):
    config = {"quant_method": pow2, "modules_to_not_convert": []}
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config)
    assert "lm_head.weight" in model.hf_quantizer.plan
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_nothing_left_to_quantize_is_an_error(tiny, pow2):
    config = {"quant_method": pow2, "modules_to_not_convert": ["model", "lm_head"]}
    with pytest.raises(ConfigError, match="nothing .* left to quantize"):
        AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config)


def test_other_heads_load_from_a_quantized_checkpoint(tiny, pow2, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config={"quant_method": pow2}).save_pretrained(
        tmp_path
    )
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base.layers[0].mlp.up_proj.weight, QuantizedTensor)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(classifier.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    assert classifier.score.weight.shape == (3, 64)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"])
def test_device_map(device_map, tiny, pow2, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config={"quant_method": pow2})
    expected.save_pretrained(tmp_path)
    for source, config in ((tiny("llama"), {"quant_method": pow2}), (tmp_path, None)):
        kwargs = {"quantization_config": config} if config else {}
        model = AutoModelForCausalLM.from_pretrained(source, device_map=device_map, **kwargs)
        assert torch.equal(logits(model), logits(expected))


def test_disk_offload_of_quantized_weights_is_refused(tiny, pow2, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    with pytest.raises(ConfigError, match="on the disk"):
        AutoModelForCausalLM.from_pretrained(
            tiny("llama"), quantization_config={"quant_method": pow2}, device_map=device_map, offload_folder=tmp_path
        )


def test_dtype_follows_from_pretrained(tiny, pow2):
    model = AutoModelForCausalLM.from_pretrained(
        tiny("llama"), quantization_config={"quant_method": pow2}, dtype=torch.bfloat16
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_generate_with_cache_and_without(tiny, pow2):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config={"quant_method": pow2})
    one = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    two = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(one, two)


def test_config_json_carries_the_method(tiny, pow2, tmp_path):
    config = {"quant_method": pow2, "group_size": 16}
    AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored == {"quant_method": pow2, "group_size": 16, "modules_to_not_convert": None}


@pytest.mark.slow
def test_compiled_model_gives_the_same_logits(tiny, pow2):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config={"quant_method": pow2})
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-5)


def test_model_is_loaded_by_a_process_that_imports_only_transformers(doclm, tmp_path):
    """Needs an installed method; any will do."""
    from qhub.registry import registry

    installed = [name for name in registry.list() if registry.list()[name].distribution.startswith(("qhub-", "pow2"))]
    chosen = next((name for name in ("pow2", "hqq", "bitsandbytes") if name in installed), None)
    if chosen is None:
        pytest.skip("no method package is installed")
    values = {"pow2": {}, "hqq": {"nbits": 4, "group_size": 64}, "bitsandbytes": {"load_in_4bit": True}}[chosen]
    script = (
        "import sys, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config="
        f"{ {'quant_method': chosen, **values}!r})\n"
        "m.save_pretrained(sys.argv[2])\n"
        "print(type(m.model.layers[0].mlp.up_proj.weight).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(doclm), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "QuantizedTensor"
    assert (tmp_path / "out" / "README.md").is_file()
