"""Models with linear layers of their own class are quantized where that class computes what nn.Linear does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig

from qhub.integrations.transformers.weights import find_weights
from qhub.tensor import QuantizedTensor


def test_falcon_is_quantized(tmp_path):
    config = FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config={"quant_method": "hqq", "nbits": 8, "group_size": 64}
    )
    quantized = {name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    assert {name.split("h.0.")[1] for name in quantized} == {
        "self_attention.query_key_value.weight",
        "self_attention.dense.weight",
        "mlp.dense_h_to_4h.weight",
        "mlp.dense_4h_to_h.weight",
    }
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        found = model(ids).logits
        model.save_pretrained(tmp_path / "out")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, found)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(ids).logits
    assert (found - dense).norm() < 0.05 * dense.norm()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Strange(nn.Linear):
    def forward(self, x, other):
        return super().forward(x) + other


@pytest.mark.parametrize("cls", [Doubled, Strange, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_other_subclasses_are_left_alone(cls):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.own = nn.Linear(4, 4), cls(4, 4)

        def get_input_embeddings(self):
            return None

    assert set(find_weights(Model())) == {"plain.weight"}
