"""What the numbers do in a layer: products, merges, cuts, and an import that stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from qhub_bitsandbytes import qhub_adapter, qhub_plan, qhub_quantize
from transformers import BitsAndBytesConfig

from qhub.plan import WeightInfo
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-nested": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def quantized(config, weight):
    """Return ``weight`` as the tensor that a model would hold."""
    planned = qhub_plan(config, [WeightInfo("w", *weight.shape, weight.dtype)])["w"]
    return QuantizedTensor.build(
        planned.layout,
        qhub_quantize(config, weight, planned.layout),
        weight.dtype,
        compute_dtype=planned.compute_dtype,
        policy=qhub_adapter(config, planned.layout),
    )


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "int8"])
@pytest.mark.parametrize("shape", [(64, 128), (24, 50)])
def test_4_bit_layers_multiply_with_their_decoded_weight(name, shape):
    weight = quantized(CONFIGS[name], random(*shape))
    x = random(5, shape[1], seed=1)
    expected = x.double() @ weight.dequantize(torch.float32).double().T
    # K products accumulated in float32.
    bound = shape[1] * 2.0**-24 * float((x.abs().double() @ weight.dequantize().abs().double().T).max())
    assert float((torch.nn.functional.linear(x, weight).double() - expected).abs().max()) <= bound


def test_int8_layers_round_their_input_but_for_outliers():
    weight = quantized(CONFIGS["int8"], random(16, 64))
    x = random(4, 64, seed=2)
    x[1, 7], x[3, 7], x[2, 30] = 20.0, -0.01, -9.0
    codes, scales = weight.parts["qweight"].double(), weight.parts["scales"].double() / 127
    # LLM.int8() (Dettmers et al. 2022), eq. 8, in float64.
    outliers = (x.abs() >= 6).any(0)
    inner = x.double().masked_fill(x.abs() >= 6, 0)
    step = inner.abs().amax(1, keepdim=True) / 127
    rounded = (inner / step).round().masked_fill(outliers, 0)
    expected = (rounded @ codes.T) * step * scales.T + (x.double() * outliers) @ (codes * scales).T
    found = torch.nn.functional.linear(x, weight)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_rewrite_of_the_same_weight_changes_nothing(name):
    weight = quantized(CONFIGS[name], random(32, 128))
    before = weight.dequantize()
    weight.copy_(before)
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("size", [0.1, 1.0])
def test_a_merge_lands_as_near_as_quantizing_afresh(name, size):
    config = CONFIGS[name]
    weight = quantized(config, random(64, 256))
    update = random(64, 4, seed=3) @ random(4, 256, seed=4)
    target = weight.dequantize() + size * update * (weight.dequantize().norm() / update.norm())
    weight.data += target - weight.dequantize()
    fresh = quantized(config, target).dequantize()
    # Nested scales are refitted under the old offset: up to a few per mille worse than with a new one.
    assert float((weight.dequantize() - target).norm()) <= 1.005 * float((fresh - target).norm())


def test_nested_rows_are_cut_exactly_or_not_at_all():
    # 256 second-level groups end with row 128 of a matrix with two blocks a row.
    weight = quantized(CONFIGS["nf4-nested"], random(256, 128))
    dense = weight.dequantize()
    half = weight[128:]
    assert isinstance(half, QuantizedTensor) and torch.equal(half.dequantize(), dense[128:])
    piece = weight[:100]
    assert torch.equal(piece.dequantize() if isinstance(piece, QuantizedTensor) else piece, dense[:100])


def test_the_plugin_is_found_by_its_method_name():
    info = registry.list()["bitsandbytes"]
    assert info.distribution == "qhub-bitsandbytes"
    assert registry.has("bitsandbytes", "qhub_quantize") and registry.has("bitsandbytes", "qhub_format")


def test_importing_the_entry_module_is_light():
    heavy = ("torch", "transformers", "bitsandbytes")
    code = f"import sys, qhub_bitsandbytes; print(*(m for m in {heavy} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
