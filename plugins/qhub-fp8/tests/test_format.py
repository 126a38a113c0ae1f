"""Entries of the dialects: read as their writers mean them, written as transformers does; damage is named."""

from __future__ import annotations

import pytest
import torch
from qhub_fp8.fbgemm import FbgemmFormat
from qhub_fp8.fbgemm import layout_of as fbgemm_layout
from qhub_fp8.format import Fp8Format
from qhub_fp8.rounding import quantize
from qhub_fp8.settings import Settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FbgemmFp8Config

from qhub.errors import LayoutError

E4M3 = torch.float8_e4m3fn


def codes(n, k, dtype=E4M3):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_a_file_of_transformers_is_read_and_written_bit_for_bit(library, tmp_path, same_bytes):
    model = AutoModelForCausalLM.from_pretrained(library)
    reference = load_file(library / "reference.safetensors")
    for name, dense in reference.items():
        if name.startswith("dequant."):
            found = model.get_parameter(name.removeprefix("dequant.")).dequantize(torch.float32)
            assert torch.equal(found, dense.float()), name
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    # The file's logits are those of a dense model; rounding inputs in groups of 64 moved them by 0.22 at most.
    assert float((logits - reference["logits"]).abs().max()) < 0.34
    model.save_pretrained(tmp_path)
    written, original = load_file(tmp_path / "model.safetensors"), load_file(library / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(same_bytes(written[name], original[name]) for name in written)


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "qscale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24, 1), (24,)], ids=str)
def test_scales_per_tensor_and_per_row(name, shape, dtype):
    settings = Settings(None, "none")
    scale = torch.rand(shape) + 0.5
    weight = codes(24, 40, dtype)
    layout, parts = Fp8Format(settings).unpack(settings.layout(24, 40), {"weight": weight, name: scale})
    layout.validate(parts)
    expected = weight.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))
    assert torch.equal(layout.dequantize(parts), expected)
    again = Fp8Format(settings).pack(layout, parts, torch.float32)
    assert again["weight_scale_inv"].shape == (() if scale.numel() == 1 else (24, 1))


@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8, torch.float32, torch.bfloat16])
def test_powers_of_two_in_every_container(stored):
    settings = Settings((16, 16), "none", powers_of_two=True)
    scale = torch.tensor([[2.0, 0.25], [1.0, 8.0]])
    held = scale.to(torch.float8_e8m0fnu).view(torch.uint8) if stored == torch.uint8 else scale.to(stored)
    weight = codes(24, 24)
    layout, parts = Fp8Format(settings).unpack(settings.layout(24, 24), {"weight": weight, "weight_scale_inv": held})
    spread = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[:24, :24]
    assert torch.equal(layout.dequantize(parts), weight.float() * spread)


@pytest.mark.parametrize("name", ["activation_scale", "input_scale", "qscale_act"])
def test_static_scales_of_inputs(name):
    settings = Settings(None, "static")
    entries = {"weight": codes(8, 16), "weight_scale": torch.tensor(0.5), name: torch.tensor([0.25])}
    layout, parts = Fp8Format(settings).unpack(settings.layout(8, 16), entries)
    assert float(parts["input_scale"]) == 0.25
    assert Fp8Format(settings).pack(layout, parts, torch.float32)["activation_scale"].shape == ()
    del entries[name]
    with pytest.raises(LayoutError, match="activation_scheme is static"):
        Fp8Format(settings).unpack(settings.layout(8, 16), entries)


def test_experts_in_4_bits(same_bytes):
    settings = Settings((128, 128), "dynamic", powers_of_two=True, fp4_experts=True)
    planned = settings.layout(16, 64, expert=True)
    parts = quantize(torch.randn(16, 64), planned, {}, powers_of_two=True)
    entries = Fp8Format(settings).pack(planned, parts, torch.float32)
    assert entries["weight"].dtype == torch.int8 and entries["weight"].shape == (16, 32)
    layout, again = Fp8Format(settings).unpack(planned, entries)
    assert all(same_bytes(again[name], parts[name]) for name in parts)
    # As transformers itself decodes it.
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    other = Fp8Dequantize(SimpleNamespace())
    if hasattr(other, "_unpack_fp4"):
        dense = other._dequantize_one(entries["weight"], entries["weight_scale_inv"], torch.float32)
        assert torch.equal(layout.dequantize(again), dense)


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_scale_inv", "activation_scale"])
def test_impossible_scales_are_named(name, value):
    settings = Settings((16, 16), "static")
    entries = {
        "weight": codes(24, 24),
        "weight_scale_inv": torch.ones(2, 2),
        "activation_scale": torch.ones(()),
    }
    entries[name].reshape(-1)[-1] = value
    with pytest.raises(LayoutError, match=name):
        Fp8Format(settings).unpack(settings.layout(24, 24), entries)


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (24, 1), ()], ids=str)
def test_scales_that_contradict_the_blocks_are_refused(shape):
    settings = Settings((16, 16), "none")
    with pytest.raises(LayoutError, match="weight_block_size"):
        Fp8Format(settings).unpack(
            settings.layout(24, 24), {"weight": codes(24, 24), "weight_scale_inv": torch.ones(shape)}
        )


def test_a_weight_without_a_scale_or_with_two_is_refused():
    settings = Settings(None, "none")
    with pytest.raises(LayoutError, match="weight_scale_inv"):
        Fp8Format(settings).unpack(settings.layout(8, 16), {"weight": codes(8, 16)})
    two = {"weight": codes(8, 16), "weight_scale_inv": torch.ones(()), "weight_scale": torch.ones(())}
    with pytest.raises(LayoutError, match="mean the same"):
        Fp8Format(settings).unpack(settings.layout(8, 16), two)


def test_weights_of_another_type_or_shape_are_refused():
    settings = Settings(None, "none")
    for weight in (torch.zeros(8, 16), torch.zeros(8, 16, dtype=torch.float8_e4m3fnuz), codes(16, 8)):
        with pytest.raises(LayoutError, match="'weight'"):
            Fp8Format(settings).unpack(settings.layout(8, 16), {"weight": weight, "weight_scale": torch.ones(())})


def test_fbgemm_rows_and_their_bound(same_bytes):
    config = FbgemmFp8Config(activation_scale_ub=3.0)
    layout = fbgemm_layout(config, 24, 40)
    assert layout.activation.limit == 3.0
    w = torch.randn(24, 40)
    parts = quantize(w, layout, {})
    entries = FbgemmFormat().pack(layout, parts, torch.float32)
    assert {name: tuple(entry.shape) for name, entry in entries.items()} == {
        "weight": (24, 40),
        "weight_scale": (24, 1),
    }
    dense = entries["weight"].float() * entries["weight_scale"]
    assert float((dense - w).norm() / w.norm()) < 0.04
    _, again = FbgemmFormat().unpack(layout, {**entries, "input_scale_ub": torch.tensor([3.0])})
    assert all(same_bytes(again[name], parts[name]) for name in parts)
    with pytest.raises(LayoutError, match="input_scale_ub"):
        FbgemmFormat().unpack(layout, {**entries, "input_scale_ub": torch.tensor([4.0])})
    entries["weight_scale"][5] = 0.0
    with pytest.raises(LayoutError, match="weight_scale"):
        FbgemmFormat().unpack(layout, entries)
