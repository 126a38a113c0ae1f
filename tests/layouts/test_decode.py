"""Every layout decodes to what its format's own formula gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import oracle
from .cases import CASES, batch, case


@pytest.mark.parametrize("name", CASES)
def test_dequantize_equals_the_formula(name: str) -> None:
    layout, parts, dense, *_ = one = case(name)
    layout.validate(parts)
    layout.check_values(parts)
    found = layout.dequantize(parts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense, rtol=0, atol=one.tolerance)


@pytest.mark.parametrize("name", CASES)
def test_tolerance_can_tell_formulas_apart(name: str) -> None:
    """Rounding may explain far less than the weights themselves, or the comparison above would prove nothing."""
    one = case(name)
    assert one.tolerance < 1e-3 * float(one.dense.square().mean().sqrt())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dequantize_to_another_dtype_rounds_once(name: str, dtype: torch.dtype) -> None:
    layout, parts, *_ = case(name)
    found = layout.dequantize(parts, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, layout.dequantize(parts).to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_batch_decodes_each_matrix(name: str) -> None:
    layout, parts, dense = batch(name, 3)
    layout.validate(parts)
    assert layout.batch_shape(parts) == (3,)
    found = layout.dequantize(parts)
    for index in range(3):
        single = case(name, index)
        assert torch.equal(found[index], layout.dequantize(single.parts)), f"matrix {index} depends on its neighbours"
    torch.testing.assert_close(found.double(), dense, rtol=0, atol=max(case(name, i).tolerance for i in range(3)))


def test_e8p_codebook_is_the_shifted_lattice() -> None:
    """E8P's entries less their shift of 1/4 are half-integer vectors with an even sum (E8), all different."""
    book = oracle.e8p_codebook()
    assert book.shape == (65536, 8)
    assert len(np.unique(book, axis=0)) == 65536
    codes = np.arange(65536)
    odd = np.array([bin(code & 255).count("1") % 2 for code in codes])
    lattice = book - np.where(odd == 1, -0.25, 0.25)[:, None]
    assert np.array_equal(np.abs(lattice) % 1, np.full((65536, 8), 0.5))
    assert not (lattice.sum(1) % 2).any()
    # 256 magnitudes up to norm 10, or 12 for the last 29.
    norms, counts = np.unique((lattice[::256] ** 2).sum(1), return_counts=True)
    assert dict(zip(norms.tolist(), counts.tolist(), strict=True)) == {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}


def test_small_floats_are_the_ones_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype, exponent_bits, mantissa_bits in ((torch.float8_e4m3fn, 4, 3), (torch.float8_e5m2, 5, 2)):
        values = codes.view(dtype).double()
        finite = torch.isfinite(values)
        mine = torch.tensor([oracle.small_float(code, exponent_bits, mantissa_bits) for code in range(256)])
        assert torch.equal(values[finite], mine.double()[finite])
