"""Rounding to nearest: the same numbers as the library's observers find for the same weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qhub_compressed_tensors.quantize import quantize
from torch import Tensor

from qhub.errors import ConfigError
from qhub.layouts.float4 import quantize_float4
from qhub.layouts.powers import rounded_exponents


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_scales_and_codes_are_the_librarys(known: Any, dense: Tensor) -> None:
    """In float32 bit for bit; of a 16-bit weight the library computes in 16 bits, and is no nearer to it."""
    weight = dense.to(known.dtype)
    found = quantize(weight, known.layout, {"max_abs": torch.full((128,), 4.0)})
    entries = known.format.pack(known.layout, found, known.dtype)
    assert sorted(entries) == sorted(known.entries)
    for name, wanted in known.entries.items():
        assert entries[name].dtype == wanted.dtype, name
        if known.dtype == torch.float32 and "NVFP4" not in known.scheme:
            assert torch.equal(_bits(entries[name]), _bits(wanted)), name
    # A scale one 16-bit step beside the library's changes the sum of squares by up to 0.03 %, either way.
    layout, parts = known.format.unpack(known.layout, entries)
    error = [(one - weight.float()).square().sum() for one in (layout.dequantize(parts), known.dequantized)]
    # Global scales of NVFP4 are not the library's, see below.
    assert float(error[0]) <= float(error[1]) * (1.02 if "NVFP4" in known.scheme else 1.001)


def test_global_scales_are_the_same_for_layers_that_loaders_fuse(cases: dict[str, Any]) -> None:
    layout = cases["NVFP4A16"].layout
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, 128, generator=generator) * std for std in (0.01, 0.03, 0.5)]
    parts = [quantize(weight, layout, {}) for weight in weights]
    assert len({float(one["scales_super"]) for one in parts}) == 1
    for weight, found in zip(weights, parts, strict=True):
        own = quantize_float4(weight, layout)
        error = [(layout.dequantize(one) - weight).square().sum() for one in (found, own)]
        assert float(error[0]) <= float(error[1]) * 1.02
    for std in (1e-4, 30.0):
        weight = torch.randn(64, 128, generator=generator) * std
        torch.testing.assert_close(quantize(weight, layout, {}), quantize_float4(weight, layout))


@pytest.mark.parametrize("scheme", ["W8A8", "FP8", "NVFP4", "MXFP4", "MXFP8", "MXFP6A16", "4 bits in 32, asymmetric"])
def test_a_weight_of_zeros(scheme: str, cases: dict[str, Any]) -> None:
    case = cases[scheme]
    parts = quantize(torch.zeros(64, 128), case.layout, {"max_abs": torch.zeros(128)})
    case.layout.validate(parts)
    case.layout.check_values(parts)
    assert float(case.layout.dequantize(parts).abs().max()) == 0


def test_powers_of_two_follow_the_rounded_mantissa() -> None:
    """1.75 and above counts as 2 for mantissas of one bit, 1.9375 for three (upstream adds to the float's bits)."""
    values = torch.cat([torch.tensor([1.0, 1.74, 1.75, 1.93, 1.94, 6.99, 7.0, 0.0]), torch.rand(500) * 100])
    for bits, largest, below in ((1, 6.0, 2), (3, 7.5, 2), (1, 448.0, 8)):
        added = values.view(torch.int32) + (1 << (23 - bits - 1))
        power = (added & 0x7F800000).view(torch.float32)
        wanted = torch.where(values == 0, 1.0, power * 2.0**-below)
        assert torch.equal(rounded_exponents(values, largest, bits).float(), wanted)


def test_stored_zeros_of_inputs_are_refused(cases: dict[str, Any], dense: Tensor) -> None:
    config = cases["W8A8"].config
    from qhub_compressed_tensors.layout import layout_of
    from qhub_compressed_tensors.scheme import scheme_of

    inputs = {"num_bits": 8, "strategy": "tensor", "symmetric": False}
    group = {**config.config_groups["W8A8"], "input_activations": inputs}
    scheme = scheme_of("g", group, "int-quantized")
    assert scheme is not None
    with pytest.raises(ConfigError, match="input_activations"):
        quantize(dense, layout_of(scheme, 64, 128, "a"), {"max_abs": torch.ones(128)})
