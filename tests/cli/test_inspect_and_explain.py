"""``qhub inspect`` and ``qhub explain``: figures measured on a checkpoint, kernels and refusals."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qhub.cli.measure import layout_text, shapeless
from qhub.layouts import Activation, Affine, Codebook, Grid, Lookup
from qhub.testing.hub_server import HubServer

# The embedded model's quantized weights: 4 layers of q, o 256x256; k, v 128x256; gate, up, down 768x256.
WEIGHTS = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 768 * 256)


def test_inspect_measures_the_checkpoint(as_json, quantized):
    data = as_json("inspect", quantized)
    with safe_open(quantized / "model.safetensors", "pt") as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    # 4-bit codes, two a byte, and a scale of 2 or 4 bytes for each 32 weights.
    codes = sum(math.prod(shape) for key, shape in shapes.items() if key.endswith("pow2_codes"))
    scales = [key for key in shapes if key.endswith("pow2_scales")]
    width = load_file(quantized / "model.safetensors")[scales[0]].element_size()
    assert codes == WEIGHTS / 2
    assert data["bits_per_weight_on_disk"] == 4 + 8 * width / 32
    assert data["bits_per_weight"] == pytest.approx(data["bits_per_weight_on_disk"], abs=0.01)
    assert (data["method"], data["plugin"], data["quantized_parameters"]) == ("pow2", True, WEIGHTS)
    # Tied embeddings of 8192 x 256, and 9 norms of 256.
    assert data["parameters"] == WEIGHTS + 8192 * 256 + 9 * 256
    assert data["share_of_all_parameters"] == pytest.approx(WEIGHTS / data["parameters"])
    assert data["share_of_linear_and_experts"] == 1
    assert data["bytes_on_disk"] == (quantized / "model.safetensors").stat().st_size
    (layout,) = data["layouts"]
    assert (layout["weights"], layout["layout"]["kind"], sum(layout["kernels"].values())) == (28, "lookup", 28)
    assert layout["bits_per_weight"] == data["bits_per_weight"]
    assert data["skipped"] == {"output head or tied weight": ["lm_head.weight"]}
    modules = {module["name"]: module for module in data["modules"]}
    assert modules["model.layers.0.mlp.up_proj.weight"]["layout"] == "lookup"
    assert modules["model.embed_tokens.weight"]["bits_per_weight"] == 16
    assert sum(module["bytes"] for module in data["modules"]) == data["bytes_in_memory"]


def test_inspect_for_people(run, quantized):
    shown = run("inspect", quantized).stdout
    assert "lookup 4-bit, groups of 32" in shown and "output head or tied weight" in shown
    assert "model.layers.3.mlp.down_proj.weight" not in shown
    assert "model.layers.3.mlp.down_proj.weight" in run("inspect", quantized, "--modules").stdout


def test_experts_are_counted(run, as_json, tiny, tmp_path):
    assert run("quantize", tiny("mixtral"), "-m", "pow2", "--group-size", "16", "-o", tmp_path).exit_code == 0
    data = as_json("inspect", tmp_path)
    assert data["share_of_linear_and_experts"] > 0.9
    experts = [module for module in data["modules"] if "experts" in module["name"]]
    assert experts and all(module["layout"] == "lookup" for module in experts)


def test_share_of_a_model_that_is_partly_quantized(run, as_json, tiny, tmp_path):
    left = '--set=modules_to_not_convert=["gate_proj", "up_proj", "down_proj", "lm_head"]'
    assert run("quantize", tiny("llama"), "-m", "pow2", "--group-size", "16", left, "-o", tmp_path).exit_code == 0
    data = as_json("inspect", tmp_path)
    attention, mlp = 2 * 64 * 64 + 2 * 32 * 64, 3 * 96 * 64
    assert data["share_of_linear_and_experts"] == pytest.approx(attention / (attention + mlp))
    assert sum(len(names) for names in data["skipped"].values()) == 7


def test_unquantized_models(as_json, run, doclm):
    data = as_json("inspect", doclm)
    assert data == {
        "model": str(doclm),
        "method": None,
        "plugin": False,
        "bytes_on_disk": (doclm / "model.safetensors").stat().st_size,
        "files": 1,
    }
    assert "not quantized" in run("inspect", doclm).stdout
    result = run("explain", doclm)
    assert result.exit_code == 1 and "no weight that a qhub plugin holds quantized" in result.stderr


def test_unquantized_model_on_the_hub_is_not_downloaded(as_json, doclm, tmp_path):
    content = {file.name: file.read_bytes() for file in doclm.iterdir()}
    with HubServer() as hub, hub.activate(cache_dir=tmp_path):
        hub.add_repo("alice/doclm", content)
        data = as_json("inspect", "alice/doclm")
        assert data["bytes_on_disk"] == len(content["model.safetensors"])
        assert not list(tmp_path.rglob("*.safetensors"))


def test_a_method_of_transformers_is_not_loaded(as_json, run, quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "model")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quark"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    data = as_json("inspect", tmp_path / "model")
    assert (data["method"], data["plugin"]) == ("quark", False) and "layouts" not in data
    assert "transformers itself" in run("inspect", tmp_path / "model").stdout


def test_a_damaged_checkpoint_is_1(run, quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for command in ("inspect", "explain"):
        result = run(command, tmp_path / "model")
        assert result.exit_code == 1 and "truncated or damaged" in result.stderr and result.stdout == ""


def test_explain_names_the_kernel_of_every_layer(as_json, run, quantized):
    data = as_json("explain", quantized, "--dtype", "float32")
    assert len(data["layers"]) == 28
    assert {layer["dtype"] for layer in data["layers"]} == {"float32"}
    assert all(next(iter(layer["kernels"])).startswith("1") for layer in data["layers"])
    assert "8 x lookup 4-bit 256x256 on cpu" in run("explain", quantized).stdout
    rows = run("explain", quantized, "--modules").stdout
    assert "model.layers.3.mlp.down_proj.weight" in rows and "M 1" in rows


def test_explain_says_why_a_kernel_is_refused(as_json, quantized, monkeypatch):
    from qhub.kernels import KernelSpec, dispatch

    only = KernelSpec("picky", "nowhere:nothing", "lookup", divides=(("N", 512),), devices=frozenset({"cpu"}))
    monkeypatch.setattr(dispatch, "_offered", {"picky": only})
    monkeypatch.setattr(dispatch, "_choices", {})
    layers = {layer["name"]: layer for layer in as_json("explain", quantized)["layers"]}
    reason = layers["model.layers.0.self_attn.q_proj.weight"]["refused"]["picky"]
    assert reason == "needs N to be a multiple of 512, this is 256"


def test_explain_of_a_forced_kernel_that_does_not_exist(run, quantized, monkeypatch):
    monkeypatch.setenv("QHUB_KERNEL", "warp")
    result = run("explain", quantized)
    assert result.exit_code == 1 and "QHUB_KERNEL=warp: no such kernel" in result.stderr


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Lookup(out_features=64, in_features=96, grid=Grid.along_k(32)), "lookup 4-bit, groups of 32"),
        (Lookup(out_features=64, in_features=96, grid=Grid.along_k(96)), "lookup 4-bit, one scale a row"),
        (Lookup(out_features=64, in_features=96, grid=Grid("block", 64, 96)), "lookup 4-bit, one scale a tensor"),
        (Lookup(out_features=64, in_features=96, grid=Grid("block", 32, 32)), "lookup 4-bit, block 32x32"),
    ],
)
def test_layout_in_words(layout, text):
    assert layout_text(shapeless(layout.describe())) == text


def test_other_layouts_in_words():
    affine = Affine(out_features=8, in_features=64, bits=8, grid=Grid.along_k(64), activation=Activation("int8", 6.0))
    text = layout_text(shapeless(affine.describe()))
    assert text.startswith("affine 8-bit") and "activation (kind int8, threshold 6)" in text
    codebook = Codebook(out_features=8, in_features=64, nbits=(8, 8), out_group=1, in_group=8, grid=Grid.along_k(64))
    assert "nbits (8, 8)" in layout_text(shapeless(codebook.describe()))
    assert torch.float32 not in shapeless(affine.describe()).values()
