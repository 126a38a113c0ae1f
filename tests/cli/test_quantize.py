"""``qhub quantize``: what it saves, what it says, and what it refuses before any work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qhub import ConfigSpec, MethodConfig, QuantizedTensor, hookimpl
from qhub.cli.loading import copy_companions
from qhub.cli.quantize import make_config
from qhub.errors import ConfigError
from qhub.registry import registry
from qhub.testing.hub_server import HubServer


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_the_folder_is_complete_and_loads(quantized, doclm):
    names = {file.name for file in quantized.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (quantized / name).read_bytes() == (doclm / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(quantized)
    direct = AutoModelForCausalLM.from_pretrained(doclm, quantization_config={"quant_method": "pow2"})
    ids = torch.arange(1, 20)[None]
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    assert torch.equal(model(ids).logits, direct(ids).logits)


def test_what_is_copied_beside_the_weights(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    wanted = ["tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt", "added_tokens.json"]
    wanted += ["special_tokens_map.json", "preprocessor_config.json", "video_preprocessor_config.json"]
    wanted += ["chat_template.jinja", "additional_chat_templates/tools.jinja"]
    others = ["config.json", "model.safetensors", "modeling_evil.py", "README.md", "model.safetensors.index.json"]
    others += ["original/tokenizer.model", "onnx/tokenizer.json"]
    for name in [*wanted, *others]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    target.mkdir()
    (target / "tokenizer.json").write_text("an older one")
    assert copy_companions(source, target) == sorted(wanted)
    written = [file for file in target.rglob("*") if file.is_file()]
    assert sorted(file.relative_to(target).as_posix() for file in written) == sorted(wanted)
    assert all(file.read_text() == file.relative_to(target).as_posix() for file in written)


def test_the_report_is_measured(as_json, tiny, tmp_path):
    out = tmp_path / "deep" / "out"
    data = as_json("quantize", tiny("llama"), "-m", "pow2", "--group-size", "16", "-o", out)
    # Per layer: q, o 64x64; k, v 32x64; gate, up, down 96x64.
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    stored = {name: tensor for name, tensor in load_file(out / "model.safetensors").items() if ".pow2_" in name}
    assert data["bits_per_weight_on_disk"] == 8 * sum(t.nbytes for t in stored.values()) / weights
    # In memory each of the 14 tensors has its table besides.
    assert data["bits_per_weight"] == pytest.approx(data["bits_per_weight_on_disk"] + 8 * 14 * 16 * 4 / weights)
    (group,) = data["quantized"]
    assert len(group["weights"]) == 14 and group["parameters"] == weights
    assert "lookup 4-bit, groups of 16" in group["text"]
    assert data["skipped"] == {"output head or tied weight": ["lm_head.weight"]}
    assert (data["bytes_before"], data["bytes_after"]) == (size_of(tiny("llama")), size_of(out))
    assert data["config"]["group_size"] == 16
    assert json.loads((out / "config.json").read_text())["quantization_config"]["group_size"] == 16
    assert 0 < data["seconds_quantizing"] < data["seconds"]


def test_the_report_for_people(run, tiny, tmp_path):
    result = run(
        "quantize", tiny("llama"), "-m", "pow2", "-o", tmp_path / "out", "--set", 'modules_to_not_convert=["q_proj"]'
    )
    assert result.exit_code == 0
    assert "listed in modules_to_not_convert" in result.stdout and "bits per weight: " in result.stdout
    assert "saved to" in result.stdout and "quantizing it with pow2" not in result.stdout
    assert "quantizing it with pow2" in result.stderr


def test_sharding_and_dtype(as_json, tiny, tmp_path):
    as_json("quantize", tiny("llama"), "-m", "pow2", "-o", tmp_path, "--max-shard-size", "20KB", "--dtype", "bfloat16")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_with_files_is_kept_unless_told(run, tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ["quantize", tiny("llama"), "-m", "pow2", "-o", tmp_path]
    result = run(*arguments)
    assert result.exit_code == 2 and "--overwrite" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert run(*arguments, "--overwrite").exit_code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "nosuch"], "pip install qhub-nosuch"),
        (["-m", "pow2", "--preset", "best"], "pow2 has no preset 'best'"),
        (["-m", "pow2", "--bits", "3"], "unknown keys ['bits']"),
        (["-m", "pow2", "--set", "group_size"], "is not KEY=VALUE"),
        (["-m", "pow2", "--set", "grup_size=32"], "unknown keys ['grup_size']"),
        (["-m", "pow2", "--group-size", "0"], "must be a positive whole number"),
        (["-m", "pow2", "--group-size", "48"], "group_size 48 does not divide 64"),
        (["-m", "pow2", "--dtype", "int8"], "no float dtype"),
        (["-m", "pow2", "--device-map", "{oops"], "is not JSON"),
    ],
)
def test_wrong_options_are_2_and_write_nothing(run, said, tiny, tmp_path, arguments, message):
    result = run("quantize", tiny("llama"), *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2 and result.stdout == ""
    assert message in said(result)
    assert not (tmp_path / "out").exists()


def test_impossible_models_and_targets_are_2(run, said, tiny, quantized, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    source = tiny("llama")
    for arguments, message in [
        ([tmp_path / "nowhere", "-o", tmp_path / "out"], "there is no folder"),
        ([tmp_path / "empty", "-o", tmp_path / "out"], "has no config.json"),
        ([source, "-o", tmp_path / "file"], "not a folder"),
        ([source, "-o", source, "--overwrite"], "it is the folder of MODEL"),
        ([quantized, "-o", tmp_path / "out"], "is quantized already, with pow2"),
    ]:
        result = run("quantize", "-m", "pow2", *arguments)
        assert result.exit_code == 2 and message in said(result)
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_1_and_writes_nothing(run, tiny, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in tiny("llama").iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:5000])
    result = run("quantize", bad, "-m", "pow2", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "error: " in result.stderr and "truncated or damaged" in result.stderr
    assert not (tmp_path / "out").exists()


@dataclass
class Two(MethodConfig):
    quant_method: ClassVar[str] = "two"
    nbits: int = 4
    group: int = 64
    fancy: bool = False


@pytest.fixture
def two(pow2):
    """A method with presets and with other names for the options than the command line's."""
    spec = ConfigSpec(
        cls=Two,
        presets={"usual": {"nbits": 3}, "small": {"nbits": 2, "group": 16}},
        from_options=lambda options: {{"bits": "nbits", "group_size": "group"}[k]: v for k, v in options.items()},
    )

    class Plugin:
        @hookimpl
        def qhub_config(self):
            return spec

    registry.register(Plugin, "two")
    yield "two"
    registry.unregister("two")


@pytest.mark.parametrize(
    ("preset", "bits", "group_size", "settings", "expected"),
    [
        (None, None, None, [], (3, 64, False)),
        ("small", None, None, [], (2, 16, False)),
        ("small", 8, None, [], (8, 16, False)),
        ("small", None, 32, ["fancy=true"], (2, 32, True)),
        (None, 8, None, [], (8, 64, False)),
        (None, None, None, ["fancy=True"], (4, 64, True)),
        ("small", 8, None, ["nbits=5"], (5, 16, False)),
    ],
)
def test_presets_options_and_settings(two, preset, bits, group_size, settings, expected):
    config = make_config(two, preset, bits, group_size, settings)
    assert isinstance(config, Two)
    assert (config.nbits, config.group, config.fancy) == expected


def test_settings_are_json_or_text(pow2):
    assert make_config(pow2, None, None, None, ['modules_to_not_convert=["a", "b=c"]']).modules_to_not_convert == [
        "a",
        "b=c",
    ]
    with pytest.raises(ConfigError, match="got 'many'"):
        make_config(pow2, None, None, None, ["group_size=many"])
    with pytest.raises(typer.BadParameter, match="KEY=VALUE"):
        make_config(pow2, None, None, None, ["=3"])


def test_push_and_read_back_from_the_hub(as_json, doclm, tmp_path):
    with HubServer(tokens={"hf_alice": "alice"}) as hub, hub.activate(token="hf_alice", cache_dir=tmp_path / "home"):
        data = as_json("quantize", doclm, "-m", "pow2", "-o", tmp_path / "out", "--push", "alice/small", "--private")
        assert data["pushed"] == "alice/small"
        repository = hub.repo("alice/small")
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(repository.files)
        assert repository.private
        data = as_json("inspect", "alice/small")
        assert (data["method"], data["bytes_on_disk"]) == ("pow2", size_of(tmp_path / "out"))
