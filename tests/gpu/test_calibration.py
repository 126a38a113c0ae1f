"""Calibrating on a GPU finds what it finds on a CPU, within rounding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import qhub
from qhub.registry import registry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_those_of_the_cpu(doclm, method, dtype):
    if method not in registry.list():
        pytest.skip(f"the plugin {method} is not installed")
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(3, 8000, (16, 128), generator=generator).tolist()
    errors = []
    for device in ("cpu", "cuda"):
        config = registry.call(method, "qhub_config").parse({"quant_method": method, "bits": 4, "group_size": 64})
        model = AutoModelForCausalLM.from_pretrained(doclm, dtype=dtype)
        qhub.quantize(model, config, data=data, device=device)
        errors.append(torch.tensor([layer.error for layer in model.hf_quantizer.calibration.layers]))
        assert model.device.type == "cpu"
    # A code that lay near the middle between two may go to the other one; in bfloat16 the inputs themselves differ.
    torch.testing.assert_close(errors[1], errors[0], rtol=0.03 if dtype == torch.float32 else 0.1, atol=1e-6)


def test_streaming_computes_on_the_gpu(doclm, tmp_path):
    if "gptq" not in registry.list():
        pytest.skip("the plugin gptq is not installed")
    config = registry.call("gptq", "qhub_config").parse({"quant_method": "gptq", "bits": 4, "group_size": 64})
    data = torch.randint(3, 8000, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
    torch.cuda.reset_peak_memory_stats()
    qhub.quantize(str(doclm), config, out=tmp_path / "out", data=data)
    assert torch.cuda.max_memory_allocated() > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cuda")
    assert torch.isfinite(model(torch.arange(3, 40, device="cuda")[None]).logits).all()
