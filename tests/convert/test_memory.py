"""A conversion holds one matrix: the process's own count of what it holds."""

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
import json, sys, threading, time, torch, transformers
from qhub.integrations.transformers.converting import convert
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

small, source, target, out = sys.argv[1:]
# What modules and caches take is not the conversion's: a small model goes first.
convert(small, target, out + "-small")
done, before = False, held()
most = before
thread = threading.Thread(target=watch); thread.start()
convert(source, target, out)
done = True; thread.join()
print(json.dumps(most - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "dense"])
def test_converting_holds_one_matrix(tmp_path: Path, target: str) -> None:
    """A model of 308 MB in int8, 1,230 MB in float32, of matrices of up to 2.9 M weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    for name, layers in (("small", 1), ("source", 24)):
        config = LlamaConfig(
            vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=8,
            max_position_embeddings=64,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / f"{name}-dense")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{name}-dense", quantization_config={"quant_method": "eetq", "weights": "int8"}
        )
        model.save_pretrained(tmp_path / name)
    packed = (tmp_path / "source" / "model.safetensors").stat().st_size
    arguments = [tmp_path / "small", tmp_path / "source", target, tmp_path / "out"]
    run = subprocess.run(
        [sys.executable, "-c", _RUN, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    peak = int(json.loads(run.stdout.splitlines()[-1]))
    matrix = 1024 * 2816
    # Translating spreads scales, zeros and codes to single weights in float32, shifts and rounds them, and compares two
    # dense weights twice (parts, and what is read back): up to fourteen such matrices, and what the allocator keeps.
    assert peak < 14 * 4 * matrix + (48 << 20) < packed, f"{peak / 2**20:.0f} MiB"
