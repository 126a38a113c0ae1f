"""Merging, unmerging and LoftQ on a GPU: the same as on a CPU, on the GPU's own tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qhub
from qhub.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
peft = pytest.importorskip("peft")


def _model(doclm: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig

    config = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "hqq": HqqConfig(nbits=4, group_size=64),
    }[name]
    return AutoModelForCausalLM.from_pretrained(
        doclm, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cuda:0"}
    )


def _adapted(model: Any) -> Any:
    torch.manual_seed(0)
    tokens = torch.randint(0, 8192, (4, 64), device="cuda")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(8):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@pytest.mark.parametrize("name", ["nf4", "hqq"])
def test_merging_keeps_most_of_an_adapter(doclm: Path, name: str) -> None:
    adapted = _adapted(_model(doclm, name))
    before = [p.dequantize() for p in adapted.parameters() if isinstance(p, QuantizedTensor)]
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    after = [p.dequantize() for p in adapted.parameters() if isinstance(p, QuantizedTensor)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    merged = adapted.merge_and_unload()
    report = merged.qhub_merge_report
    assert report.kl is not None and report.kl_without is not None and report.kl < 0.35 * report.kl_without
    assert sum(layer.spread for layer in report.layers) > 20
    quantized = [p for p in merged.parameters() if isinstance(p, QuantizedTensor)]
    assert len(quantized) == 28 and all(p.device.type == "cuda" for p in quantized)


def test_loftq_starts_nearer(doclm: Path) -> None:
    adapted = peft.get_peft_model(_model(doclm, "nf4"), peft.LoraConfig(r=8, target_modules="all-linear"))
    report = qhub.loftq_init(adapted, steps=3)
    assert report.after < 0.95 * report.before
    assert next(adapted.parameters()).device.type == "cuda"
