"""Matrices on top of each other that cannot become one of their own layout: nothing about them changes."""

from __future__ import annotations

import pytest
import torch

from qhub.errors import LayoutError
from qhub.layouts import Activation, Stacked
from qhub.tensor import QuantizedTensor

from .cases import case

# Codebooks of their own, groups with members in every row, a rotation of the output, and two different layouts.
PAIRS = [
    ("aqlm_2x8", "aqlm_2x8"),
    ("hqq4_axis0", "hqq4_axis0"),
    ("quip_e8p12", "quip_e8p12"),
    ("quip_e8p12", "aqlm_2x8"),
]


def _pair(names: tuple[str, str], batch: int = 0) -> list[QuantizedTensor]:
    made = []
    for seed, name in enumerate(names):
        one = case(name, seed=seed)
        tensors = [QuantizedTensor.build(one.layout, one.parts, torch.float32) for _ in range(batch or 1)]
        made.append(torch.stack(tensors) if batch else tensors[0])
    return made  # type: ignore[return-value]


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("batch", [0, 3])
def test_joining_keeps_the_parts_and_cutting_gives_them_back(names: tuple[str, str], batch: int) -> None:
    first, second = _pair(names, batch)
    joined = torch.cat([first, second], dim=-2)
    assert isinstance(joined, QuantizedTensor)
    assert joined.quant_layout.kind == "stacked"
    joined.quant_layout.validate(joined.parts)
    joined.quant_layout.check_values(joined.parts)
    assert joined.nbytes == first.nbytes + second.nbytes
    assert torch.equal(joined.dequantize(), torch.cat([first.dequantize(), second.dequantize()], dim=-2))
    halves = joined.split([first.shape[-2], second.shape[-2]], dim=-2)
    for half, own in zip(halves, (first, second), strict=True):
        assert half.quant_layout == own.quant_layout
        assert all(torch.equal(half.parts[name], own.parts[name]) for name in own.parts)


def test_three_make_one_of_three_bands() -> None:
    first, second = _pair(PAIRS[0])
    joined = torch.cat([torch.cat([first, second]), first])
    assert isinstance(joined.quant_layout, Stacked)
    assert len(joined.quant_layout.bands) == 3
    rows = first.shape[0]
    tail = joined[rows:]
    assert isinstance(tail, QuantizedTensor)
    assert torch.equal(tail.dequantize(), torch.cat([second.dequantize(), first.dequantize()]))
    assert isinstance(joined[8 : rows + 8], QuantizedTensor)
    assert torch.equal(joined[8 : rows + 8].dequantize(), joined.dequantize()[8 : rows + 8])


def test_the_product_is_that_of_the_dense_matrix() -> None:
    joined = torch.cat(_pair(PAIRS[3]))
    x = torch.randn(5, joined.shape[1], generator=torch.Generator().manual_seed(0))
    expected = x.double() @ joined.dequantize().double().T
    found = torch.nn.functional.linear(x, joined)
    # float32 sums of K products: relative to the sizes of the summands, not of their sum.
    bound = float((x.double().abs() @ joined.dequantize().double().abs().T).max()) * joined.shape[1] * 2.0**-24
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


def test_writing_stays_in_each_band() -> None:
    first, second = _pair(PAIRS[1])
    joined = torch.cat([first, second]).clone()
    dense = joined.dequantize()
    rows = first.shape[0]
    target = dense.clone()
    target[rows:] *= 3
    with torch.no_grad():
        joined.copy_(target)
    torch.testing.assert_close(joined.dequantize()[:rows], dense[:rows], rtol=0, atol=1e-5 * float(dense.abs().max()))
    assert (joined.dequantize()[rows:] - target[rows:]).norm() < 0.2 * target[rows:].norm()


def test_what_does_not_fit_is_refused() -> None:
    first, second = (one.quant_layout for one in _pair(PAIRS[0]))
    with pytest.raises(LayoutError, match="do not make up"):
        Stacked(out_features=7, in_features=first.in_features, bands=(first, second))
    with pytest.raises(LayoutError, match="activation"):
        Stacked(
            out_features=first.out_features + second.out_features,
            in_features=first.in_features,
            activation=Activation("int8"),
            bands=(first, second),
        )
