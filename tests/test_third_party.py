"""The example of a third party: installed with pip into a fresh environment, used by scripts that never import qhub."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path

import pytest

from qhub.testing.environment import FreshEnvironment

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "third_party_plugin"

QUANTIZE = """
import json, sys
from transformers import AutoModelForCausalLM, LlamaConfig
import torch

torch.manual_seed(0)
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
AutoModelForCausalLM.from_config(config).save_pretrained("dense")
model = AutoModelForCausalLM.from_pretrained("dense", quantization_config={"quant_method": "pow2", "group_size": 16})
model.save_pretrained("quantized")
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    torch.save(model(ids).logits, "logits.pt")
layer = model.model.layers[0].mlp.up_proj
print(json.dumps([type(layer).__name__, type(layer.weight).__name__, model.get_memory_footprint()]))
"""

LOAD = """
import json
from transformers import AutoModelForCausalLM
import torch

model = AutoModelForCausalLM.from_pretrained("quantized")
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    same = torch.equal(model(ids).logits, torch.load("logits.pt", weights_only=True))
tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
print(json.dumps([same, tokens.shape[1], type(model.model.layers[1].self_attn.q_proj.weight).__name__]))
"""

LORA = """
import json
from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model
import torch

torch.manual_seed(0)
model = get_peft_model(AutoModelForCausalLM.from_pretrained("quantized"), LoraConfig(r=4, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids, losses = torch.arange(1, 9)[None], []
for _ in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
merged = model.merge_and_unload()
merged.save_pretrained("merged")
again = AutoModelForCausalLM.from_pretrained("merged")
with torch.no_grad():
    same = torch.equal(again(ids).logits, merged(ids).logits)
    losses.append(again(input_ids=ids, labels=ids).loss.item())
print(json.dumps([losses, same, type(again.model.layers[0].mlp.up_proj.weight).__name__]))
"""

LOAD_WITHOUT = """
from transformers import AutoModelForCausalLM

try:
    AutoModelForCausalLM.from_pretrained("quantized")
except Exception as error:
    print(type(error).__name__, error)
"""


def printed(output: str) -> list:
    """Return what a script printed last: libraries may print too, gptqmodel does when PEFT imports it."""
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    """A new environment with the example installed in it, and the quantized model of the first script."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs pip and hatchling: pip install qhub-core[dev]")
    made = FreshEnvironment(tmp_path_factory.mktemp("third") / "env", without=["pow2-quant"])
    listing = "from qhub.registry import registry; print('pow2' in registry.list())"
    assert made.run("-c", listing).strip() == "False", "the environment is not fresh: it has the example already"
    made.install(EXAMPLE)
    assert made.run("-c", listing).strip() == "True"
    return made


@pytest.fixture(scope="module")
def folder(environment: FreshEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the first script has quantized and saved a model."""
    place = tmp_path_factory.mktemp("work")
    layer, weight, footprint = printed(environment.run("-c", QUANTIZE, cwd=place))
    assert (layer, weight) == ("QuantLinear", "QuantizedTensor")
    dense = sum(file.stat().st_size for file in (place / "dense").glob("*.safetensors"))
    assert footprint < dense / 2
    return place


def test_scripts_never_import_qhub():
    for script in (QUANTIZE, LOAD, LORA, LOAD_WITHOUT):
        assert "qhub" not in script


def test_quantizes_and_saves(folder):
    stored = json.loads((folder / "quantized" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "pow2"
    assert stored["group_size"] == 16
    assert "pow2-quant" in (folder / "quantized" / "README.md").read_text()


def test_loads_in_another_process(environment, folder):
    assert printed(environment.run("-c", LOAD, cwd=folder)) == [True, 12, "QuantizedTensor"]


def test_lora_trains_merges_and_reloads(environment, folder):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    losses, same, weight = printed(environment.run("-c", LORA, cwd=folder))
    assert losses[4] < losses[0], "training did not reduce the loss"
    assert losses[5] < losses[0], "the merge lost the training"
    assert same
    assert weight == "QuantizedTensor"


def test_method_is_gone_without_the_package(environment, folder):
    """The same checkpoint where the plugin is turned off: one clear error, no random weights."""
    said = environment.run("-c", LOAD_WITHOUT, cwd=folder, env={"QHUB_DISABLE": "pow2"})
    assert said.startswith("UnknownMethodError")
    assert "'pow2'" in said and "QHUB_DISABLE=pow2" in said


def test_example_is_small():
    """A complete method in under 100 lines, everything counted."""
    lines = [line for file in EXAMPLE.rglob("*.py") for line in file.read_text().splitlines()]
    assert 0 < len(lines) < 100


def test_example_needs_only_the_core():
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["qhub-core"]
    assert list(project["entry-points"]) == ["qhub.plugins"]
