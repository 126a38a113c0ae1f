"""The numbers: those that EETQ chooses, on real weights and where rounding is decided."""

from __future__ import annotations

import pytest
import torch
from qhub_eetq.format import EetqFormat
from qhub_eetq.numbers import quantize_rows
from qhub_eetq.plan import int8_rows
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import chunks


def test_codes_and_scales_are_those_that_eetq_wrote(stored: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    sources = {key.removeprefix("source."): value for key, value in reference.items() if key.startswith("source.")}
    assert len(sources) == 2
    for name, weight in sources.items():
        entries = {"weight": stored[name], "weight_scales": stored[f"{name}_scales"]}
        _, parts = EetqFormat().unpack(int8_rows(*weight.shape), entries)
        found = quantize_rows(weight)
        assert torch.equal(found["qweight"], parts["qweight"])
        assert torch.equal(found["scales"], parts["scales"])


def test_halves_go_away_from_zero_and_the_largest_positive_code_is_127() -> None:
    # The scale is 128 / 128 = 1.
    row = torch.tensor([[-128.0, 128.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997]])
    assert quantize_rows(row)["qweight"].tolist() == [[-128, 127, 1, -1, 2, 3, -3, 0]]


def test_codes_are_those_of_the_scale_before_it_is_rounded() -> None:
    # In float16 the scale becomes 1 / 128, and quotients near a half fall on the other side of it.
    absmax = 1.0004
    w = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    row = torch.cat([torch.tensor([absmax], dtype=torch.float64), w]).float().unsqueeze(0)
    found = quantize_rows(row)
    assert float(found["scales"]) == 1 / 128
    exact = row.double() / (float(row[0, 0]) / 128)
    expected = (exact.sign() * (exact.abs() + 0.5).floor()).clamp(-128, 127)
    rounded = (row.double() * 128).round().clamp(-128, 127)
    assert torch.equal(found["qweight"].double(), expected)
    assert not torch.equal(expected, rounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_error_is_half_a_step_but_for_the_top(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several pieces: the rows of a piece must get their own scales.
    monkeypatch.setattr(chunks, "chunk_size", lambda device: 256)
    weight = (torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)
    parts = quantize_rows(weight)
    assert parts["scales"].dtype == torch.float16
    w, scale = weight.double(), weight.double().abs().amax(1, keepdim=True) / 128
    error = (parts["qweight"].double() * parts["scales"].double() - w).abs()
    # Half a step, a whole one for the largest magnitude if positive; the scale's own rounding is 2^-11 of the value.
    bound = torch.where(w > 126.5 * scale, scale, scale / 2) + w.abs() * 2.0**-11 * (1 + 2.0**-7)
    assert bool((error <= bound * (1 + 1e-6)).all())


def test_rows_without_a_scale_are_zeros() -> None:
    weight = torch.zeros(2, 64)
    # 2^-19 / 128 is below half of float16's smallest number, 2^-24.
    weight[1] = 2.0**-19
    parts = quantize_rows(weight)
    assert not parts["qweight"].any() and not parts["scales"].any()


def test_a_scale_beyond_float16_is_refused() -> None:
    weight = torch.ones(2, 64)
    weight[1, 3] = 128 * 65536.0
    with pytest.raises(LayoutError, match=r"beyond float16.*modules_to_not_convert"):
        quantize_rows(weight)
