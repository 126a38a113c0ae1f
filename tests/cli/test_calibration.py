"""``qhub quantize`` with a method that needs data: streams, reports errors layer by layer, goes on after a stop."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

import qhub
from qhub import QuantizedTensor

TEXT = "Files are named by paths, and a path that begins with a slash begins at the root. " * 40


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": TEXT[i : i + 400]}) + "\n" for i in range(0, 1600, 100)))
    return file


def test_folder_to_folder(as_json, doclm, data, tmp_path):
    out = tmp_path / "out"
    options = ["--bits", 4, "--group-size", 64, "--dataset", data, "--samples", 8, "--length", 64]
    found = as_json("quantize", doclm, "-m", "gptq", *options, "-o", out)
    assert {"config.json", "tokenizer.json", "calibration.json", "README.md"} <= {f.name for f in out.iterdir()}
    assert 4.0 < found["bits_per_weight"] < 4.5
    report = json.loads((out / "calibration.json").read_text())
    assert len(report["layers"]) == 28 and all(0 < layer["error"] < 0.1 for layer in report["layers"])
    assert not (tmp_path / "out.partial").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    # The same numbers as by from_pretrained, whose config names the texts.
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(doclm)
    config = GPTQConfig(bits=4, group_size=64, dataset=texts[:8], tokenizer=tokenizer, model_seqlen=64)
    direct = AutoModelForCausalLM.from_pretrained(doclm, quantization_config=config)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)


def test_an_existing_folder_is_left_alone(run, doclm, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    done = run("quantize", doclm, "-m", "gptq", "--dataset", data, "-o", out)
    assert done.exit_code == 2 and "--overwrite" in done.stderr
    assert [f.name for f in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["not json"], "line 1: not JSON"),
        ([json.dumps({"text": ""})], "no tokens"),
        ([json.dumps([1, 2, 99999])], "token 99999, the model knows 8192"),
    ],
)
def test_data_that_are_none(run, doclm, tmp_path, lines, message):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    done = run("quantize", doclm, "-m", "gptq", "--dataset", file, "-o", tmp_path / "out")
    assert done.exit_code != 0 and message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_live_model_is_pushed_with_plain_tags(doclm, data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(doclm)
    qhub.quantize(model, GPTQConfig(bits=8, group_size=64), data=data, samples=2, length=32)
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "\n- gptq\n" in card and "!!python" not in card
