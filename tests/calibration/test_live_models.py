"""Models that are in memory already keep their weights while another one is quantized from the same files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qhub.integrations.transformers.memory import Releaser

linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")


def resident(file: Path) -> int:
    """Return how many bytes of the mappings of ``file`` are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(maxsplit=1)[0].endswith(":"):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@linux
def test_releasing_leaves_what_was_mapped_before_alone(tmp_path: Path) -> None:
    """Mapped weights that were written into are in no file: a later load of that file must not drop them."""
    file = (tmp_path / "model.safetensors").resolve()
    size = 8 << 20
    save_file({"weight": torch.zeros(size // 4)}, file)
    live = load_file(file)["weight"]
    live.add_(1)
    releaser = Releaser({file})
    before = resident(file)
    later = load_file(file)["weight"]
    assert float(later.sum()) == 0
    read = resident(file) - before
    assert read >= size, "the file is not mapped, so this test shows nothing"
    releaser.release()
    assert resident(file) - before < size // 8, "nothing was given back"
    assert bool((live == 1).all()), "the values of a tensor that someone else had written were lost"
    assert float(later.sum()) == 0


def test_quantizing_again_leaves_the_first_model_alone(tmp_path: Path) -> None:
    """Equalizing writes into norms, which lie where the file was mapped; so do users who train them."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    pytest.importorskip("qhub_awq")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    values = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

    def dense() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    def quantized() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=dict(values)).eval()

    trained = dense()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(2)
    kept = {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
    ids = torch.arange(1, 17)[None]
    first = quantized()
    norm = first.model.layers[0].input_layernorm.weight
    assert not bool((norm == 1).all()), "equalizing left the norm as it was, so this test shows nothing"
    with torch.no_grad():
        expected = first(ids).logits
        second = quantized()
        assert torch.equal(first(ids).logits, expected)
        assert torch.equal(second(ids).logits, expected)
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, kept[name]), f"{name} of a float model in memory changed"
