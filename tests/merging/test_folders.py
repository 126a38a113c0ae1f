"""Merging from folder to folder, in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import qhub
from qhub.errors import CheckpointError, UnsupportedError
from qhub.tensor import QuantizedTensor


def _load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"attn_implementation": "eager", **options})


def test_a_quantized_base_stays_quantized_and_reloads(cases: Any, tmp_path: Path) -> None:
    """The folder holds what merging in memory gives, with tokenizer and report; merging it again is refused."""
    case = cases("hqq4")
    out = tmp_path / "merged"
    report = qhub.merge(case.base, case.adapter, out=out)
    assert report.kl is not None and report.kl_without is not None and report.kl < 0.5 * report.kl_without
    again = _load(out)
    live = qhub.merge(_load(case.base, attn_implementation="sdpa"), case.adapter)
    live.set_attn_implementation("eager")
    assert sum(isinstance(p, QuantizedTensor) for p in again.parameters()) == 28
    assert torch.equal(case.logits(again), case.logits(live))
    told = json.loads((out / "merge.json").read_text())
    assert told["kl"] == report.kl and len(told["layers"]) == 28
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UnsupportedError, match="merged into these weights before"):
        qhub.merge(out, case.adapter, out=tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("shards", ["50GB", "4MB"])
def test_a_dense_base_merges_to_the_bits_that_peft_gives(cases: Any, doclm: Path, tmp_path: Path, shards: str) -> None:
    """Streamed block by block, from one file or many: every tensor is the one of merge_and_unload in memory."""
    import peft

    base = doclm
    if shards != "50GB":
        base = tmp_path / "sharded"
        _load(doclm, dtype="auto").save_pretrained(base, max_shard_size=shards)
        assert len(list(base.glob("*.safetensors"))) > 1
    adapter = cases("nf4").adapter
    report = qhub.merge(base, adapter, out=tmp_path / "out")
    assert {layer.grid for layer in report.layers} == {"dense"}
    expected = peft.PeftModel.from_pretrained(_load(doclm, dtype="auto"), adapter).merge_and_unload().state_dict()
    got = _load(tmp_path / "out", dtype="auto")
    assert got.dtype == torch.bfloat16 and getattr(got.config, "quantization_config", None) is None
    state = got.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    changed = _load(doclm, dtype="auto").state_dict()
    assert any(not torch.equal(state[name], changed[name]) for name in state)


def test_dequantizing_gives_the_exact_sum(cases: Any, tmp_path: Path) -> None:
    """No rounding but that to the weights' dtype: the logits are those of the adapter on top."""
    case = cases("nf4")
    qhub.merge(case.base, case.adapter, out=tmp_path / "out", dequantize=True)
    got = _load(tmp_path / "out")
    assert not any(isinstance(p, QuantizedTensor) for p in got.parameters())
    on_top = case.logits(case.fresh())
    # Both are float32: products of other matrices, the same up to their rounding.
    assert float((case.logits(got) - on_top).abs().max()) < 1e-3 * float(on_top.abs().max())


def test_experts_are_written_one_by_one(tiny: Any, tmp_path: Path) -> None:
    """A mixture's fused experts get the checkpoint's own names back, adapted or not."""
    import peft
    from safetensors.torch import load_file

    base = tiny("qwen3-moe")
    model = peft.get_peft_model(_load(base), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    qhub.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    names, before = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (tmp_path / "out", base)
    )
    assert names.keys() == before.keys()
    moved = {name for name in names if not torch.equal(names[name], before[name])}
    assert moved == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}


def test_nothing_is_written_when_it_cannot_be(cases: Any, tmp_path: Path) -> None:
    """An output folder with files, an adapter that does not fit, one that changes no weights."""
    import peft

    case = cases("nf4")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="holds files already"):
        qhub.merge(case.base, case.adapter, out=full)
    assert [file.name for file in full.iterdir()] == ["notes.txt"]
    prompt = peft.get_peft_model(_load(case.base), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompt.save_pretrained(tmp_path / "prompt")
    for dequantize in (False, True):
        with pytest.raises(UnsupportedError, match="changes no weights"):
            qhub.merge(case.base, tmp_path / "prompt", out=tmp_path / "out", dequantize=dequantize)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_the_command_says_what_it_did(cases: Any, tmp_path: Path) -> None:
    """qhub merge writes the folder and its figures as JSON; wrong usage is told apart from failure."""
    from qhub.cli.app import app

    case, run = cases("nf4"), CliRunner()
    out = tmp_path / "out"
    done = run.invoke(app, ["merge", str(case.base), str(case.adapter), "-o", str(out), "--samples", "2", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["tokens"] == 2 * 32 and told["kl"] < told["kl_without"]
    assert (out / "model.safetensors").is_file()
    again = run.invoke(app, ["merge", str(case.base), str(case.adapter), "-o", str(out)])
    assert again.exit_code == 2 and "not empty" in " ".join(again.output.replace("│", " ").split())
    wrong = run.invoke(app, ["merge", str(case.base), str(case.adapter), "-o", str(tmp_path / "x"), "--grid", "new"])
    assert wrong.exit_code == 2 and "keep the grid" in " ".join(wrong.output.replace("│", " ").split())
    missing = run.invoke(app, ["merge", str(case.base), str(tmp_path / "none"), "-o", str(tmp_path / "x")])
    assert missing.exit_code == 1 and "none" in missing.output
