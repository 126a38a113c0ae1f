"""Checkpoints that Intel Neural Compressor wrote: the same weights, the same logits, the same bytes written back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from qhub_fp8.inc import FP8Config, convert, load
from qhub_fp8.inc.format import IncFormat
from qhub_fp8.inc.measuring import read_measurements
from qhub_fp8.inc.plan import layout_of, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qhub.errors import ConfigError, LayoutError

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["inc-pow2", "inc-channels"])
def test_they_are_read_run_and_written(name, tmp_path, same_bytes):
    model = load(DATA / name)
    reference = load_file(DATA / name / "reference.safetensors")
    for key, dense in reference.items():
        if key.startswith("dequant."):
            assert torch.equal(model.get_parameter(key.removeprefix("dequant.")).dequantize(torch.float32), dense), key
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    # Products of the same codes and scales in float32, summed in another order.
    torch.testing.assert_close(logits, reference["logits"], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    written, original = load_file(tmp_path / "model.safetensors"), load_file(DATA / name / "model.safetensors")
    # Parameters that hold the number 0, in one of its modes.
    original = {key: value for key, value in original.items() if not key.endswith("zero_point")}
    assert written.keys() == original.keys()
    assert all(same_bytes(written[key], original[key]) for key in written)


def test_the_same_measurements_give_the_same_numbers(tmp_path, same_bytes):
    """The weights of its file are its own rounding of a model; dequantized and quantized again they stay."""
    dense = load(DATA / "inc-pow2").dequantize()
    folder = tmp_path / "stats"
    folder.mkdir()
    shutil.copyfile(DATA / "inc-pow2" / "measured.json", folder / "measured_hooks_maxabs.json")
    config = FP8Config(
        mode="QUANTIZE",
        scale_method="maxabs_pow2",
        hp_dtype="fp32",
        use_qdq=True,
        # On a CPU the library has the range of Gaudi 3's E4M3.
        device_for_scales="GAUDI3",
        dump_stats_path=str(folder / "measured"),
        blocklist={"names": ["lm_head"], "types": []},
    )
    convert(dense, config).save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(DATA / "inc-pow2" / "model.safetensors")
    scales = [key for key in original if "quant_input" in key]
    assert len(scales) == 14
    assert all(same_bytes(written[key], original[key]) for key in scales)


def test_its_measurements_are_read(tmp_path):
    shutil.copyfile(DATA / "inc-pow2" / "measured.json", tmp_path / "m_hooks_maxabs.json")
    nodes = json.loads((DATA / "inc-pow2" / "measured.json").read_text())["Nodes"]
    found = read_measurements(FP8Config(dump_stats_path=str(tmp_path / "m")))
    assert found.keys() == nodes.keys()
    for name, values in found.items():
        assert float(values["max_abs"].max()) == pytest.approx(nodes[name]["inputs"][0][0][0])


@pytest.mark.parametrize("qdq", [False, True])
@pytest.mark.parametrize("method", ["maxabs_pow2", "act_maxabs_hw_weights_pcs_maxabs_pow2"])
def test_entries(method, qdq, same_bytes):
    config = FP8Config(scale_method=method)
    layout = layout_of(config, 24, 40)
    seen = {"max_abs": torch.full((40,), 5.0), "tokens": torch.tensor(9)}
    parts = quantize(config, torch.randn(24, 40), layout, seen)
    entries = IncFormat(torch.bfloat16, qdq).pack(layout, parts, torch.float32)
    assert tuple(entries["weight"].shape) == (40, 24)
    names = {"dequant_weights.scale", "quant_input.scale"} if qdq else {"scale_weight", "scale_input"}
    assert set(entries) == {"weight", "quant_input.scale_inv", *names}
    for reader in (IncFormat(torch.bfloat16), IncFormat(torch.bfloat16, True)):
        _, again = reader.unpack(layout, entries)
        assert all(same_bytes(again[name], parts[name]) for name in parts)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["scale_weight", "scale_input", "quant_input.scale_inv"])
def test_impossible_scales_are_named(name, value):
    config = FP8Config()
    layout = layout_of(config, 24, 40)
    seen = {"max_abs": torch.ones(40), "tokens": torch.tensor(9)}
    entries = IncFormat(torch.bfloat16).pack(layout, quantize(config, torch.randn(24, 40), layout, seen), torch.float32)
    entries[name] = torch.full_like(entries[name], value)
    with pytest.raises(LayoutError, match=name):
        IncFormat(torch.bfloat16).unpack(layout, entries)


def test_models_of_other_methods_are_refused(library):
    with pytest.raises(ConfigError, match="no model of Intel"):
        load(library)
    assert AutoModelForCausalLM.from_pretrained(library).hf_quantizer.method == "fp8"
