"""What only a CUDA device can show: moves, offload between CPU and GPU, compiled layers, equal results on both
devices."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from qhub import QuantizedTensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

IDS = torch.arange(1, 10)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(IDS.to(device if device.type != "meta" else "cuda")).logits.cpu()


@pytest.fixture
def model(doclm, pow2):
    return AutoModelForCausalLM.from_pretrained(doclm, quantization_config={"quant_method": pow2}, dtype=torch.float32)


def test_codes_are_the_same_on_both_devices(doclm, pow2, model):
    on_gpu = AutoModelForCausalLM.from_pretrained(
        doclm, quantization_config={"quant_method": pow2}, dtype=torch.float32, device_map="cuda"
    )
    for name, parameter in model.named_parameters():
        other = on_gpu.get_parameter(name)
        assert other.device.type == "cuda"
        if isinstance(parameter, QuantizedTensor):
            assert torch.equal(parameter.parts["qweight"], other.parts["qweight"].cpu()), name
    # float32 matrix products on the GPU sum in another order: 512 terms, 1e-4 is a hundred roundings.
    torch.testing.assert_close(logits(on_gpu), logits(model), rtol=1e-3, atol=1e-3)


def test_moving_there_and_back_changes_nothing(model):
    before = logits(model)
    model.to("cuda")
    assert all(p.device.type == "cuda" for p in model.parameters())
    model.to("cpu")
    assert torch.equal(logits(model), before)


def test_save_from_the_gpu_and_load_anywhere(doclm, pow2, model, tmp_path):
    model.to("cuda").save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            assert torch.equal(parameter.parts["qweight"].cpu(), again.get_parameter(name).parts["qweight"])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")), logits(model))


@pytest.mark.parametrize("source", ["dense", "quantized"])
def test_offload_to_the_cpu_with_a_device_map(source, doclm, pow2, model, tmp_path):
    folder, arguments = doclm, {"quantization_config": {"quant_method": pow2}}
    if source == "quantized":
        model.save_pretrained(tmp_path / "q")
        folder, arguments = tmp_path / "q", {}
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": 0,
              "model.layers.3": "cpu", "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}  # fmt: skip
    split = AutoModelForCausalLM.from_pretrained(folder, device_map=places, dtype=torch.float32, **arguments)
    with torch.no_grad():
        found = split(IDS.cuda()).logits.cpu()
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)
    split.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("limit", ["auto", "balanced"])
def test_automatic_device_map(limit, doclm, pow2, model):
    found = AutoModelForCausalLM.from_pretrained(
        doclm, device_map=limit, quantization_config={"quant_method": pow2}, dtype=torch.float32
    )
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-3, atol=1e-3)


def test_compiled_on_the_gpu(model):
    model.to("cuda")
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        found = compiled(IDS.cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_generate_in_bfloat16(doclm, pow2):
    model = AutoModelForCausalLM.from_pretrained(doclm, device_map="cuda", quantization_config={"quant_method": pow2})
    assert model.dtype == torch.bfloat16
    made = model.generate(IDS.cuda(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert made.shape == (1, IDS.shape[1] + 8)


def test_adapter_trains_and_merges_on_the_gpu(doclm, pow2):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(doclm, device_map="cuda", quantization_config={"quant_method": pow2})
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    ids = torch.arange(1, 129, device="cuda")[None]
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    assert bool(torch.isfinite(logits(merged)).all())
