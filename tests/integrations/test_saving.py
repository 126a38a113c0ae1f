"""A save that fails or is killed leaves the previous checkpoint whole; a successful one leaves nothing else behind."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qhub.errors import CheckpointError
from qhub.integrations.transformers.headers import sort_metadata

IDS = torch.arange(1, 10)[None]


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.is_file()}


@pytest.fixture
def model(tiny, pow2):
    return AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config={"quant_method": pow2})


def test_full_disk_leaves_previous_files(model, tmp_path, monkeypatch):
    import transformers.modeling_utils as host

    target = tmp_path / "model"
    model.save_pretrained(target, max_shard_size="20KB")
    before = digest(target)
    original, calls = host.safe_save_file, []

    def full(tensors, filename, *args, **kwargs):
        calls.append(filename)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return original(tensors, filename, *args, **kwargs)

    monkeypatch.setattr(host, "safe_save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(target, max_shard_size="10KB")
    assert len(calls) == 2
    assert digest(target) == before
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_metadata_is_written_in_one_order(tmp_path):
    file, tensors = tmp_path / "model.safetensors", {"a": torch.arange(7), "b": torch.ones(3, 2)}
    metadata = {"format": "pt", **{f"key-{number}": f'{{"\u00e4/\\": {number}}}' for number in range(40)}}
    found = set()
    for _ in range(5):
        save_file(tensors, file, metadata=metadata)
        sort_metadata(file)
        found.add(file.read_bytes())
    assert len(found) == 1
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == metadata
        assert all(torch.equal(opened.get_tensor(name), value) for name, value in tensors.items())


def test_fewer_shards_remove_the_old_ones(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    names = {f.name for f in tmp_path.iterdir()}
    assert [n for n in names if n.endswith(".safetensors")] == ["model.safetensors"]
    assert not any(n.endswith(".index.json") for n in names)
    assert "notes.txt" in names
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_a_card_of_the_user_is_kept(model, tmp_path):
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_saving_over_a_file_is_refused(model, tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "x"


def test_saving_changes_nothing_in_the_live_model(model, tmp_path):
    """bitsandbytes' CPU path repacks weights on the first forward and writes a wrong absmax afterwards."""
    with torch.no_grad():
        first = model(IDS).logits
        model.save_pretrained(tmp_path / "a")
        second = model(IDS).logits
        model.save_pretrained(tmp_path / "b")
    assert torch.equal(first, second)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


_SAVE_FOREVER = """
import sys, importlib.util, torch
from transformers import AutoModelForCausalLM
from qhub.registry import registry
from qhub.integrations.transformers import install
if "pow2" not in registry.list():
    spec = importlib.util.spec_from_file_location("pow2_quant", sys.argv[3])
    module = importlib.util.module_from_spec(spec); sys.modules["pow2_quant"] = module; spec.loader.exec_module(module)
    registry.register(module, "pow2"); install()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config={"quant_method": "pow2"})
print("ready", flush=True)
while True:
    model.save_pretrained(sys.argv[2], max_shard_size="20KB")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kill_while_saving_leaves_a_loadable_checkpoint(model, tiny, tmp_path):
    target = tmp_path / "model"
    model.save_pretrained(target, max_shard_size="20KB")
    expected = model(IDS).logits
    plugin = Path(__file__).resolve().parents[2] / "examples/third_party_plugin/pow2_quant/__init__.py"
    arguments = [sys.executable, "-c", _SAVE_FOREVER, str(tiny("llama")), str(target), str(plugin)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        for delay in (0.05, 0.13):
            time.sleep(delay)
            os.kill(process.pid, signal.SIGSTOP)
            # The same numbers are written each time, so any mix of whole files is a whole checkpoint.
            assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(IDS).logits, expected)
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(IDS).logits, expected)
