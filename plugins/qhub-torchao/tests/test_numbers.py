"""What is chosen, dequantized and computed, against torchao's own answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from qhub_torchao import float8, int4, integers
from qhub_torchao.format import TorchAoFormat
from qhub_torchao.quantize import quantize
from torch import Tensor

from qhub.kernels.reference import linear
from qhub.layouts import Affine


def test_quantizes_as_torchao_does(golden: Any, same: Callable[[Tensor, Tensor], bool]) -> None:
    """Codes, scales and zeros, bit for bit, in the entries of a file."""
    if "tiles-hqq" in golden.name:
        pytest.skip("torchao fits it in float16 on a GPU: see test_half_quadratic_tiles")
    layout = golden.layout
    entries = TorchAoFormat(golden.config).pack(layout, quantize(golden.dense, layout, golden.config), torch.float32)
    assert entries.keys() == golden.entries.keys()
    for name, entry in entries.items():
        assert same(entry, golden.entries[name]), name


def test_half_quadratic_tiles(cases: dict[str, Any]) -> None:
    """torchao's fit runs in float16 on a GPU, this one in float32: as near to the weights, and nearer than tinygemm's
    range."""
    case = cases["tiles-hqq-g64"]
    layout, weight = case.layout, case.dense.float()
    found = layout.dequantize(quantize(case.dense, layout, case.config))
    ranged, scale, zero = int4.tinygemm(case.dense.reshape(16, -1, 64))
    plain = ((ranged.float() - 8) * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).reshape(weight.shape)
    errors = [float((one.float() - weight).abs().pow(0.7).mean()) for one in (found, case.dequantized, plain)]
    assert errors[0] <= 1.01 * errors[1]
    assert errors[0] < errors[2]


def test_dequantizes_as_torchao_does(golden: Any) -> None:
    """The very weights, in the weight's own dtype; tinygemm's as its kernel multiplies a unit matrix."""
    layout, parts = TorchAoFormat(golden.config).unpack(golden.layout, golden.entries)
    assert torch.equal(layout.dequantize(parts, golden.dense.dtype), golden.dequantized)


def test_multiplies_as_torchao_does(golden: Any) -> None:
    """Outputs agree: but for the order of sums, and for a code of a rounded input, where torchao computes the input's
    scale in bfloat16 (2^-9 of the largest input moves codes by up to half a step)."""
    layout, parts = TorchAoFormat(golden.config).unpack(golden.layout, golden.entries)
    found = linear(golden.inputs, layout, parts).float()
    wanted, dtype = golden.outputs.float(), golden.dense.dtype
    magnitude = golden.inputs.float().abs() @ layout.dequantize(parts).abs().T
    eps = torch.finfo(dtype).eps
    # Rounding of the output and of every product, and then of every input to a code.
    allowed = magnitude * 2 * eps + wanted.abs() * eps
    if layout.activation.kind != "none":
        steps = {"int8": 1 / 63.5, "float8": 1 / 16}[layout.activation.kind]
        spread = golden.inputs.float().abs().amax(-1 if layout.activation.granularity == "row" else None, keepdim=True)
        allowed = allowed + steps * spread * layout.dequantize(parts).abs().sum(-1)[None]
    assert bool(((found - wanted).abs() <= allowed).all())
    # Far inside the bound as a whole: an input that is not rounded, or rounded otherwise, would show.
    assert float((found - wanted).norm()) <= (2e-2 if eps > 1e-3 else 1e-3) * float(wanted.norm())


def test_a_group_of_zeros_has_a_scale() -> None:
    """torchao divides 0 by 0 there, and stores NaN."""
    scales = float8.scales_of(torch.tensor([0.0, 448.0]), torch.float8_e4m3fn)
    assert scales.tolist() == [1.0, 1.0]
    tiny = torch.tensor([2.0**-24], dtype=torch.float16)
    assert float(float8.scales_of(tiny, torch.float8_e5m2)) > 0


@pytest.mark.parametrize("mapping", ["symmetric", "symmetric_no_clipping_err", "asymmetric"])
def test_every_weight_lies_within_its_step(mapping: str) -> None:
    """Against float64: no code is further than half a step, but at an end that is clipped."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) + 0.3
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    for bits in (2, 4, 8):
        ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale, zero = integers.scales_and_zeros(low, high, ends, mapping)
        q = integers.codes(weight, scale, zero, ends)
        near = (q.double() - (0 if zero is None else zero.double())) * scale.double()
        clipped = 1.0 if mapping == "symmetric" else 0.5
        assert bool(((near - weight.double()).abs() <= scale.double() * (clipped + 1e-3)).all())


def test_symmetric_int4_for_float8_inputs() -> None:
    """The largest magnitude becomes code -8, or is clipped to 7; zeros are 0."""
    weight = torch.tensor([[[-8.0, 7.0, 0.4, 0.6], [1.0, -0.5, 0.0, 0.25]]])
    q, scale, zero = int4.plain_symmetric(weight)
    assert (q - 8).tolist() == [[[-8, 7, 0, 1], [7, -4, 0, 2]]]
    assert scale.tolist() == [[1.0, 0.125]]
    assert not zero.any()


def test_plain_int4_spans_the_group() -> None:
    """Least and largest weight of a group are met exactly: codes 0 and 15."""
    weight = torch.tensor([[[1.0, 16.0, 8.0, 3.4]]])
    q, scale, zero = int4.plain(weight)
    assert q.tolist() == [[[0, 15, 7, 2]]]
    assert ((q - 8) * scale + zero).tolist() == [[[1.0, 16.0, 8.0, 3.0]]]


def test_layouts_pack_their_bits(cases: dict[str, Any]) -> None:
    """In memory a 3-bit code takes 3 bits, whatever it takes in torchao's file."""
    for name, bits in (("intx1-group", 1), ("intx3-asym-f16", 3), ("tiles-g32", 4)):
        layout = cases[name].layout
        assert isinstance(layout, Affine)
        assert layout.core_specs()["qweight"].shape == (layout.out_features, layout.in_features * bits // 8)
