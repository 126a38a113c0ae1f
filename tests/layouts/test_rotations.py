"""Divisors, and Hadamard factors that are stored as integers."""

from __future__ import annotations

import pytest
import torch

from qhub.errors import LayoutError
from qhub.layouts import Affine, Grid, Transform
from qhub.layouts.transforms import transform_input, transform_output

# Order 4: symmetric matrices would not show which way a factor is turned.
_FOUR = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [-1, -1, 1, 1], [1, -1, -1, 1]], dtype=torch.int8)


def _layout() -> Affine:
    return Affine(
        out_features=8,
        in_features=16,
        bits=8,
        signed=True,
        grid=Grid.along_k(16),
        transforms=(
            Transform("divide", "in"),
            Transform("scale", "in"),
            Transform("hadamard", "in", 4),
            Transform("hadamard", "out", 4),
            Transform("divide", "out"),
        ),
    )


def _parts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "qweight": torch.randint(-128, 128, (8, 16), generator=generator).to(torch.int8),
        "scales": torch.rand(8, 1, generator=generator) + 0.5,
        "in_divisor": torch.rand(16, generator=generator) + 0.5,
        "in_scale": torch.rand(16, generator=generator) + 0.5,
        "in_hadamard": _FOUR,
        "out_hadamard": _FOUR.t().contiguous(),
        "out_divisor": torch.rand(8, generator=generator) + 0.5,
    }


def _rotation(factor: torch.Tensor, size: int) -> torch.Tensor:
    power = size // 4
    rows = [[(-1.0) ** bin(i & j).count("1") for j in range(power)] for i in range(power)]
    return torch.kron(factor.double().contiguous() / 2, torch.tensor(rows, dtype=torch.float64) / power**0.5)


def test_the_weight_is_the_product_of_its_steps() -> None:
    layout, parts = _layout(), _parts()
    layout.validate(parts)
    layout.check_values(parts)
    stored = parts["qweight"].double() * parts["scales"].double()
    before = _rotation(_FOUR, 16) @ torch.diag(parts["in_scale"].double() / parts["in_divisor"].double())
    after = torch.diag(1 / parts["out_divisor"].double()) @ _rotation(_FOUR.t(), 8)
    expected = after @ stored @ before
    torch.testing.assert_close(layout.dequantize(parts).double(), expected, rtol=1e-5, atol=1e-4)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    product = transform_output(transform_input(x, layout, parts) @ layout.decode(parts).T, layout, parts)
    torch.testing.assert_close(product.double(), x.double() @ expected.T, rtol=1e-5, atol=1e-3)


def test_writing_takes_the_steps_off() -> None:
    layout, parts = _layout(), _parts()
    written = layout.requantize(layout.dequantize(parts), parts, "keep")
    assert torch.equal(written["qweight"], parts["qweight"])


def test_a_divisor_of_0_is_refused() -> None:
    parts = _parts()
    parts["in_divisor"][3] = 0
    with pytest.raises(LayoutError, match="'in_divisor' holds 0"):
        _layout().check_values(parts)


@pytest.mark.parametrize("change", [(0, 0, -1), (2, 1, 0), (1, 1, 3)])
def test_integers_that_are_no_hadamard_matrix_are_refused(change: tuple[int, int, int]) -> None:
    row, column, value = change
    matrix = _FOUR.clone()
    matrix[row, column] = value
    with pytest.raises(LayoutError, match="'in_hadamard' is not orthogonal"):
        _layout().check_values({**_parts(), "in_hadamard": matrix})
