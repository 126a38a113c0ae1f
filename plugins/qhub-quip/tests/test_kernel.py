"""The product between rotations: which kernel runs, and that it is the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qhub_quip.format import QuipFormat
from qhub_quip.kernel import accepts, linear

from qhub.kernels import Problem
from qhub.kernels.dispatch import choose
from qhub.layouts import Affine, Grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_it_gives_the_product_with_the_dense_weight(golden: Any, dtype: torch.dtype, rows: int) -> None:
    layout, parts = QuipFormat(golden.config).unpack(golden.layout, golden.entries)
    n, k = golden.dequantized.shape
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(rows, k, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
    expected = x.double() @ golden.dequantized.double().T + bias.double()
    found = linear(x, layout, parts, bias)
    assert found.dtype == dtype and found.shape == (rows, n)
    # float32 inside; the output is rounded once.
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert float((found.double() - expected).norm() / expected.norm()) < rounding


def test_layers_choose_it(known: dict[str, Any]) -> None:
    case = known["3 bits, 20"]
    layout, parts = QuipFormat(case.config).unpack(case.layout, case.entries)
    for dtype in (torch.float32, torch.bfloat16):
        choice = choose(layout, parts, dtype)
        assert choice.name(1) == choice.name(1000) == "codebook-rotated"


def test_layers_without_rotation_are_left_to_others() -> None:
    layout = Affine(out_features=8, in_features=8, bits=8, signed=True, grid=Grid.along_k(8))
    reason = accepts(Problem(layout, "cpu", torch.float32))
    assert reason is not None and "no rotation" in reason
