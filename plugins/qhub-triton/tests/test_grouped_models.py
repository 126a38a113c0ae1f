"""transformers' own models with fused experts run by the grouped products, and say so where they are not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qhub.layouts import Affine, Grid
from qhub.layouts.tiled import Tiled
from qhub.tensor import QuantizedTensor

experts = pytest.importorskip("qhub_triton.grouped.experts")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny(kind):
    """Return a tiny model of transformers' with experts, in float16."""
    transformers = pytest.importorskip("transformers")
    common = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 50,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    config = getattr(transformers, f"{kind}Config")(**common)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).to(DEVICE).eval()


def quantized(model):
    """Quantize the experts of ``model`` and return their module."""
    (module,) = [m for m in model.modules() if hasattr(m, "gate_up_proj") and getattr(m, "down_proj", None) is not None]
    for name in ("gate_up_proj", "down_proj"):
        dense = getattr(module, name).detach()
        rows = dense.transpose(-1, -2) if module.is_transposed else dense
        layout = Affine(out_features=rows.shape[-2], in_features=rows.shape[-1], bits=4, grid=Grid.along_k(32))
        layout = dataclasses.replace(layout, zero_point=8.0)
        parts = {"qweight": torch.zeros(rows.shape[0], rows.shape[1], rows.shape[2] // 2, dtype=torch.uint8)}
        parts["scales"] = torch.ones(rows.shape[0], *layout.scale_shape)
        parts = layout.requantize(rows.float(), {name: part.to(DEVICE) for name, part in parts.items()}, "refit")
        weight = QuantizedTensor.build(*Tiled.arrange(layout, parts), torch.float16, transposed=module.is_transposed)
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
        if module.has_bias:
            getattr(module, f"{name}_bias").data.normal_(0, 0.1)
    return module


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_models(kind, monkeypatch):
    monkeypatch.setattr(QuantizedTensor, "is_cuda", True)
    model = tiny(kind)
    module = quantized(model)
    ids = torch.arange(24, device=DEVICE).view(2, 12) % 50
    experts.register()
    experts.register()
    with torch.no_grad():
        model.set_experts_implementation("eager")
        wanted = [model(ids).logits.double(), model(ids[:1, :1]).logits.double()]
        model.set_experts_implementation("qhub")
        calls = []
        monkeypatch.setattr(experts, "_routes", lambda *a, own=experts._routes: calls.append(1) or own(*a))
        found = [model(ids).logits.double(), model(ids[:1, :1]).logits.double()]
    assert len(calls) == 2
    assert experts._activation(module) == {"Mixtral": "silu", "GptOss": None}[kind]
    for own, other in zip(found, wanted, strict=True):
        assert float((own - other).norm() / other.norm()) < 2.0**-8


def test_says_why_it_loops(caplog):
    model = tiny("Mixtral")
    experts.register()
    ids = torch.arange(4, device=DEVICE).view(1, 4)
    with torch.no_grad(), caplog.at_level("WARNING", logger="qhub"):
        model.set_experts_implementation("eager")
        wanted = model(ids).logits
        model.set_experts_implementation("qhub")
        for _ in range(2):
            assert torch.equal(model(ids).logits, wanted)
    assert sum("no quantized weight of several experts" in record.message for record in caplog.records) <= 1
    assert any("no quantized weight of several experts" in said for said in experts._said)


def test_a_wrong_product_is_not_used(monkeypatch):
    from qhub_triton.grouped import admission
    from qhub_triton.grouped.product import Product

    monkeypatch.setattr(admission, "_found", {})
    monkeypatch.setattr(experts, "_said", set())
    monkeypatch.setattr(QuantizedTensor, "is_cuda", True)
    model = tiny("Mixtral")
    module = quantized(model)
    right = Product.__call__
    monkeypatch.setattr(Product, "__call__", lambda self, *a, **k: right(self, *a, **k) * 1.5)
    experts.register()
    ids = torch.arange(12, device=DEVICE).view(1, 12)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        wanted = model(ids).logits
        model.set_experts_implementation("qhub")
        assert torch.equal(model(ids).logits, wanted)
    (said,) = experts._said
    assert type(module).__name__ in said and "differs" in said
