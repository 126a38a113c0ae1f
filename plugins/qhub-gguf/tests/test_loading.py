"""Files that llama.cpp wrote, loaded packed: weights, logits, memory, adapters, and the same bytes written back."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from qhub.errors import CheckpointError
from qhub.layouts.blocks import Blocks
from qhub.tensor import QuantizedTensor
from qhub.testing.conformance.models import INPUT, build_config

DATA = Path(__file__).parent / "data"
CASES = ("q4_k_m", "mix-legacy", "mix-iq")
FILE = "model.gguf"


def load(folder: Path, file: str = FILE, **loading: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **loading)


def logits(model: Any, ids: torch.Tensor = INPUT) -> torch.Tensor:
    with torch.no_grad():
        return model(ids.to(model.device)).logits.cpu()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Path:
    return DATA / request.param


@pytest.fixture(scope="module")
def reference(case: Path) -> dict[str, Any]:
    return json.loads((case / "reference.json").read_text())


def test_weights_are_those_of_the_file(case, reference):
    parameters = dict(load(case).named_parameters())
    for name, digest in reference["weights"].items():
        weight = parameters[name]
        # One matrix of the legacy mix is in BF16, which is no block type.
        dense = weight.dequantize(torch.float32) if isinstance(weight, QuantizedTensor) else weight.detach()
        assert isinstance(weight, QuantizedTensor) or torch.equal(dense, dense.bfloat16().float()), f"{name} is dense"
        assert hashlib.sha256(dense.numpy().tobytes()).hexdigest() == digest, name


def test_logits_are_the_dequantized_model_s(case, reference):
    found = logits(load(case), torch.tensor(reference["input_ids"]))[0, :, :16]
    # Rounded to six decimals in the file; sums of some 256 products in float32.
    assert (found - torch.tensor(reference["logits"])).abs().max() < 1e-5


def test_a_process_that_imports_only_transformers_loads_it(case, reference):
    script = (
        "import sys, json, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file='model.gguf')\n"
        "print(json.dumps([type(p.data).__name__ for p in model.parameters()]), 'gguf' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(case)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = json.loads(done.stdout.strip().rsplit("]", 1)[0].rsplit("\n", 1)[-1] + "]")
    assert kinds.count("QuantizedTensor") >= len(reference["weights"]) - 1
    assert done.stdout.strip().endswith("False"), "the package gguf was imported"


def test_packed_weights_lie_in_the_mapped_file(case):
    """Opening copies nothing: what the weights hold is the file's bytes, in a mapping of the file."""
    model = load(case)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not list mappings")
    ranges = []
    for line in maps.read_text().splitlines():
        if line.endswith(str(case / FILE)):
            start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
            ranges.append((start, end))
    assert ranges, "the file is not mapped"
    permuted = ("q_proj", "k_proj")
    for name, weight in model.named_parameters():
        if isinstance(weight, QuantizedTensor) and not any(part in name for part in permuted):
            where = weight.parts["blocks"].data_ptr()
            assert any(start <= where < end for start, end in ranges), f"{name} was copied"


def test_saving_writes_the_same_bytes(case, tmp_path):
    load(case).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / FILE).read_bytes() == (case / FILE).read_bytes()


def test_in_16_bits_the_same_bytes_too(case, tmp_path):
    """Norms rounded to bfloat16 in memory are not rounded in the file, unless they were changed."""
    load(case, dtype=torch.bfloat16).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / FILE).read_bytes() == (case / FILE).read_bytes()


def test_a_changed_norm_is_written(tmp_path):
    model = load(DATA / "q4_k_m")
    with torch.no_grad():
        model.model.norm.weight.add_(0.25)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    assert torch.equal(logits(again), logits(model))


def test_saving_over_the_file_it_came_from(tmp_path):
    shutil.copytree(DATA / "q4_k_m", tmp_path / "model")
    model = load(tmp_path / "model")
    before = logits(model)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(model), before)
    assert (tmp_path / "model" / FILE).read_bytes() == (DATA / "q4_k_m" / FILE).read_bytes()


def test_a_folder_names_its_file(tmp_path):
    model = load(DATA / "q4_k_m")
    model.save_pretrained(tmp_path)
    by_name, by_class = AutoModelForCausalLM.from_pretrained(tmp_path), type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(by_name), logits(model))
    assert torch.equal(logits(by_class), logits(model))
    assert isinstance(by_name.model.layers[0].mlp.up_proj.weight, QuantizedTensor)


def test_a_class_without_the_head_loads(tmp_path):
    model = AutoModel.from_pretrained(DATA / "mix-legacy", gguf_file=FILE)
    assert isinstance(model.layers[0].mlp.up_proj.weight, QuantizedTensor)


def test_dequantize_true_is_a_plain_model(tmp_path):
    from transformers import GgufConfig

    plain = load(DATA / "q4_k_m", quantization_config=GgufConfig(dequantize=True))
    assert not any(isinstance(p, QuantizedTensor) for p in plain.parameters())
    assert torch.allclose(logits(plain), logits(load(DATA / "q4_k_m")), atol=1e-5)
    plain.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_disk_in_a_device_map_is_the_mapped_file():
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = load(DATA / "q4_k_m", device_map={**places, "lm_head": "disk"})
    assert torch.equal(logits(model), logits(load(DATA / "q4_k_m")))


def test_an_automatic_device_map_leaves_nothing_to_the_disk():
    model = load(DATA / "q4_k_m", device_map="auto", max_memory={"cpu": "50KB"})
    assert "disk" not in {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    assert torch.allclose(logits(model), logits(load(DATA / "q4_k_m")))


def test_a_lora_trains_merges_and_unmerges():
    from peft import LoraConfig, get_peft_model

    base = load(DATA / "q4_k_m")
    before = {n: w.parts["blocks"].clone() for n, w in base.named_parameters() if isinstance(w, QuantizedTensor)}
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(INPUT, labels=INPUT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    on_top = logits(model)
    model.merge_adapter()
    assert (logits(model) - on_top).norm() < (logits(load(DATA / "q4_k_m")) - on_top).norm()
    model.unmerge_adapter()
    weights = {n.removeprefix("base_model.model.").replace(".base_layer", ""): w for n, w in model.named_parameters()}
    for name, blocks in before.items():
        assert torch.equal(weights[name].parts["blocks"], blocks), name


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, -100])
def test_a_truncated_file_is_named(kept, tmp_path):
    raw = (DATA / "q4_k_m" / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(raw[:kept])
    with pytest.raises(CheckpointError, match=FILE):
        load(tmp_path)


def test_a_scale_of_nan_names_the_tensor(tmp_path):
    from qhub_gguf.container import GgufFile

    source = GgufFile.open(DATA / "q4_k_m" / FILE)
    info = source.tensors["blk.0.ffn_up.weight"]
    raw = bytearray((DATA / "q4_k_m" / FILE).read_bytes())
    start = info.offset
    # The first two bytes of a Q4_K block are its scale in float16.
    raw[start : start + 2] = b"\x00\x7e"
    (tmp_path / FILE).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"up_proj.*NaN"):
        load(tmp_path)


def test_a_file_of_another_model_is_refused(tmp_path):
    config = AutoConfig.from_pretrained(DATA / "q4_k_m", gguf_file=FILE)
    config.num_hidden_layers += 1
    with pytest.raises(CheckpointError, match=r"layers\.1\..* is missing"):
        load(DATA / "q4_k_m", config=config)


# -- quantizing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(build_config("llama", 256)).save_pretrained(folder)
    return folder


def quantize(dense: Path, **values: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(dense, quantization_config={"quant_method": "gguf", **values})


def records(model: Any) -> dict[str, str]:
    weights = {name: w.quant_layout for name, w in model.named_parameters() if isinstance(w, QuantizedTensor)}
    return {name: layout.record.name for name, layout in weights.items() if isinstance(layout, Blocks)}


def test_quantized_saved_and_reloaded(dense, tmp_path):
    model = quantize(dense, file_type="Q4_K_M")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert records(again) == records(model)
    assert torch.equal(logits(again), logits(model))


def test_tensor_types_go_before_the_mix(dense):
    found = records(quantize(dense, file_type="Q4_0", tensor_types={r"ffn_down": "Q6_K"}))
    assert {name: kind for name, kind in found.items() if "down_proj" in name} == {
        name: "Q6_K" for name in found if "down_proj" in name
    }
    assert found["model.layers.0.mlp.up_proj.weight"] == "Q4_0"


def test_importance_lowers_the_error_where_it_is_said_to_matter(dense, tmp_path):
    from qhub_gguf.imatrix import ImportanceMatrix

    model = AutoModelForCausalLM.from_pretrained(dense)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name).detach()
    matters = torch.ones(weight.shape[1])
    matters[::8] = 1000.0
    tensor = "blk.0.ffn_up.weight"
    ImportanceMatrix({tensor: matters}, {tensor: torch.tensor(512)}).write(tmp_path / "imatrix.gguf")
    plain = quantize(dense, file_type="Q3_K_M")
    weighted = quantize(dense, file_type="Q3_K_M", imatrix=str(tmp_path / "imatrix.gguf"))
    errors = [
        (m.get_parameter(name).dequantize(torch.float32) - weight)[:, ::8].square().sum() for m in (plain, weighted)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_calibrating_weighs_errors_by_the_inputs(dense):
    from qhub_gguf.config import GgufQuantConfig

    from qhub import quantize as quantize_live

    samples = [{"input_ids": torch.randint(0, 100, (1, 32))} for _ in range(4)]
    model = AutoModelForCausalLM.from_pretrained(dense)
    done = quantize_live(model, GgufQuantConfig(file_type="Q3_K_M", calibrate=True), data=samples)
    plain = records(quantize(dense, file_type="Q3_K_M"))
    assert records(done).keys() == plain.keys()
    assert done.hf_quantizer.calibration is not None


def test_split_files_load(dense, tmp_path):
    model = quantize(dense, file_type="Q8_0")
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert torch.equal(logits(load(tmp_path, files[0].name)), logits(model))
    files[1].unlink()
    with pytest.raises(CheckpointError, match=files[1].name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_file(dense, tmp_path, monkeypatch):
    model = quantize(dense, file_type="Q8_0")
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((OSError, CheckpointError), match="No space left"):
        quantize(dense, file_type="Q4_0").save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    del model
    gc.collect()
