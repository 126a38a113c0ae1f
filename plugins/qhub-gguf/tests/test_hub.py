"""A GGUF model goes to the Hub and comes back, by the repository's name alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from qhub.tensor import QuantizedTensor
from qhub.testing.conformance.models import INPUT
from qhub.testing.hub_server import HubServer

DATA = Path(__file__).parent / "data" / "q4_k_m"


def test_pushed_and_loaded_by_name(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(DATA, gguf_file="model.gguf")
    tokens = {"hf_alice": "alice"}
    with HubServer(tokens=tokens) as hub, hub.activate(token="hf_alice", cache_dir=tmp_path / "home"):
        model.push_to_hub("alice/tiny-gguf")
        again = AutoModelForCausalLM.from_pretrained("alice/tiny-gguf")
        by_file = AutoModelForCausalLM.from_pretrained("alice/tiny-gguf", gguf_file="model.gguf")
    assert isinstance(again.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    with torch.no_grad():
        wanted = model(INPUT).logits
        assert torch.equal(again(INPUT).logits, wanted)
        assert torch.equal(by_file(INPUT).logits, wanted)
