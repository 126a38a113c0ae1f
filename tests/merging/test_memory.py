"""A merge from folder to folder never holds the float model: the process's own count of what it holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

# Anonymous memory: pages of mapped files are the kernel's to take back.
_RUN = """
import json, sys, threading, time, torch, transformers, peft, qhub
from qhub.integrations.peft.merging import merge_folder
torch.set_num_threads(1)

def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    global most
    while not done:
        most = max(most, held())
        time.sleep(0.005)

base, adapter, out, dequantize, samples = sys.argv[1:]
done, before = False, held()
most = before
thread = threading.Thread(target=watch); thread.start()
qhub.merge(base, adapter, out=out, dequantize=dequantize == "1", samples=int(samples))
done = True; thread.join()
print(json.dumps(most - before))
"""


def _peak(*arguments: object) -> int:
    run = subprocess.run(
        [sys.executable, "-c", _RUN, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return int(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_merging_holds_a_block_or_the_packed_model(tmp_path: Path) -> None:
    """A model of 24 blocks and 1,240 MB in float32: dense results take a block and a little, packed ones the codes."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=8,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "dense", max_shard_size="200MB")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    del adapted, model
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    )
    packed.save_pretrained(tmp_path / "packed")
    del packed
    codes = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    adapter = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    # Beside what is named, room for one block's update and copy, and for what Python and transformers make meanwhile.
    room = 4 * 4 * block + 2 * adapter + (100 << 20)
    dense = _peak(tmp_path / "dense", tmp_path / "adapter", tmp_path / "one", 0, 0)
    assert dense < room < 4 * size / 2
    exact = _peak(tmp_path / "packed", tmp_path / "adapter", tmp_path / "two", 1, 0)
    assert exact < codes + room
    merged = _peak(tmp_path / "packed", tmp_path / "adapter", tmp_path / "three", 0, 4)
    # What saving copies of the codes, and inputs of the layers: 128 tokens of four kinds a block, 2 bytes each.
    inputs = 24 * 128 * (3 * 1024 + 2816) * 2
    assert merged < 2 * codes + inputs + room
    print(f"\ndense {4 * size >> 20} MB, packed {codes >> 20} MB: held {dense >> 20}, {exact >> 20}, {merged >> 20} MB")
