"""``qhub convert``: between methods without a loss, and with one only when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qhub import convert
from qhub.errors import ConfigError, LossError
from qhub.tensor import QuantizedTensor
from qhub.testing.conformance.models import write_model

ROOT = Path(__file__).parents[2] / "plugins"


def weights(folder: Path, **loading: Any) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, **loading)
    return {
        name: (p.dequantize(torch.float32) if isinstance(p, QuantizedTensor) else p.detach().float()).cpu()
        for name, p in model.named_parameters()
    }


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that quantizes a tiny model once per config: a folder."""
    made: dict[str, Path] = {}

    def make(values: dict[str, Any], architecture: str = "llama", hidden: int = 64) -> Path:
        key = json.dumps([values, architecture, hidden], sort_keys=True)
        if key not in made:
            dense = tmp_path_factory.mktemp("dense")
            write_model(architecture, hidden, dense)
            model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=values, dtype=torch.float32)
            made[key] = tmp_path_factory.mktemp("quantized")
            model.save_pretrained(made[key])
        return made[key]

    return make


AWQ = ROOT / "qhub-awq/tests/data/tiny-llama-gemm-g32"
PACKED = ROOT / "qhub-compressed-tensors/tests/data/tiny-llama-w4a16"


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a symmetric 4-bit GPTQ checkpoint: the numbers of one that llmcompressor wrote."""
    folder = tmp_path_factory.mktemp("gptq")
    assert convert(PACKED, "gptq", folder).lossless
    assert_equal(weights(PACKED), weights(folder))
    return folder


@pytest.mark.parametrize("target", ["awq", "hqq", "compressed-tensors", "gguf", "dense"])
def test_gptq_goes_everywhere_and_comes_back(tmp_path, gptq, target):
    source = gptq
    report = convert(source, target, tmp_path / "there")
    assert report.lossless
    assert report.weights == 7
    before = weights(source)
    assert_equal(before, weights(tmp_path / "there"))
    if target != "dense":
        assert convert(tmp_path / "there", "gptq", tmp_path / "back").lossless
        assert_equal(before, weights(tmp_path / "back"))


def test_awq_zeros_survive_gptq(tmp_path):
    assert convert(AWQ, "gptq", tmp_path / "gptq").lossless
    assert convert(tmp_path / "gptq", "awq", tmp_path / "awq").lossless
    assert_equal(weights(AWQ), weights(tmp_path / "awq"))


@pytest.mark.parametrize("case", ["tiny-llama-b3-g128-act-asym-v2", "tiny-llama-b4-g32-act", "tiny-llama-b4-g32-asym"])
@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_zeros_and_orders_go_along(tmp_path, case, target):
    source = ROOT / "qhub-gptq/tests/data" / case
    assert convert(source, target, tmp_path / "out").lossless
    assert_equal(weights(source), weights(tmp_path / "out"))


def test_a_gguf_file_is_a_source(tmp_path, gptq):
    convert(gptq, "gguf", tmp_path / "gguf")
    assert convert(tmp_path / "gguf" / "model.gguf", "gptq", tmp_path / "gptq").lossless
    assert_equal(weights(tmp_path / "gguf"), weights(tmp_path / "gptq"))


def test_experts_are_converted_one_by_one(tmp_path, quantized):
    source = quantized({"quant_method": "eetq", "weights": "int8"}, "qwen3_moe", 128)
    for target in ("gguf", "compressed-tensors"):
        assert convert(source, target, tmp_path / target).lossless
        assert_equal(weights(source), weights(tmp_path / target))


def test_a_loss_is_named_and_nothing_is_written(tmp_path, quantized):
    source = quantized({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    with pytest.raises(LossError, match=r"_proj.*no integers under scales.*--requantize"):
        convert(source, "gptq", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_checkpoint_survives_a_loss(tmp_path, gptq, quantized):
    out = tmp_path / "out"
    convert(gptq, "awq", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(LossError):
        convert(quantized({"quant_method": "hqq", "nbits": 4, "group_size": 64}), "awq", out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_requantizing_reports_what_it_cost(tmp_path, quantized):
    source = quantized({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    texts = [{"input_ids": torch.randint(0, 100, (1, 12), generator=torch.Generator().manual_seed(1))}]
    report = convert(
        source, "hqq", tmp_path / "out", requantize=True, options={"nbits": 8, "group_size": 64}, data=texts
    )
    assert not report.lossless
    assert "table" in report.summary() or "integers" in report.summary()
    # 8 bits on top of 4: close, and not the same.
    assert report.kl is not None
    assert 0 < report.kl < 1e-3
    assert report.tokens == 12
    coarse = convert(
        source, "hqq", tmp_path / "two", requantize=True, options={"nbits": 2, "group_size": 64}, data=texts
    )
    assert coarse.kl is not None
    assert coarse.kl > 10 * report.kl


def test_dense_is_what_the_codes_stood_for(tmp_path, quantized):
    source = quantized({"quant_method": "bitsandbytes", "load_in_8bit": True})
    convert(source, "dense", tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert_equal(weights(source), weights(tmp_path / "dense"))


def test_an_unquantized_model_is_sent_to_quantize(tmp_path):
    write_model("llama", 64, tmp_path / "dense")
    with pytest.raises(ConfigError, match="qhub quantize"):
        convert(tmp_path / "dense", "gptq", tmp_path / "out")


def test_unknown_targets_are_listed(tmp_path, gptq):
    with pytest.raises(ConfigError, match="no installed plugin serves 'gtpq'"):
        convert(gptq, "gtpq", tmp_path / "out")


def test_shards_hold_one_matrix_more_than_asked_at_most(tmp_path, gptq):
    convert(gptq, "awq", tmp_path / "out", max_shard_size="60KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == {name for name, where in index["weight_map"].items() if where == file.name}
    assert_equal(weights(gptq), weights(tmp_path / "out"))


def test_quantize_writes_another_format(tmp_path):
    from typer.testing import CliRunner

    from qhub.cli.app import app

    write_model("llama", 64, tmp_path / "dense")
    arguments = ["quantize", str(tmp_path / "dense"), "-m", "eetq", "--format", "compressed-tensors"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert values["quant_method"] == "compressed-tensors"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "out"]
    own = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config={"quant_method": "eetq", "weights": "int8"}
    )
    expected = {n: p.dequantize(torch.float32) for n, p in own.named_parameters() if isinstance(p, QuantizedTensor)}
    found = weights(tmp_path / "out")
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_the_command_reports_and_refuses(tmp_path, gptq, quantized):
    from typer.testing import CliRunner

    from qhub.cli.app import app

    done = CliRunner().invoke(app, ["convert", str(gptq), "--to", "awq", "-o", str(tmp_path / "awq"), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["lossless"]
    assert report["weights"] == 7
    source = quantized({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    done = CliRunner().invoke(app, ["convert", str(source), "--to", "awq", "-o", str(tmp_path / "no")])
    assert done.exit_code != 0
    assert not (tmp_path / "no").exists()
