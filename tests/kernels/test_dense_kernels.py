"""Kernels that decode: admitted when every weight lies within one rounding, used by the reference and by gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qhub.kernels import dispatch
from qhub.kernels.dense import dense
from qhub.kernels.dense_kernels import decoders
from qhub.tensor import QuantizedTensor

from .conftest import affine


def decoding(change=lambda weight: weight, **fields):
    seen = []

    def decode(layout, parts, dtype):
        seen.append(dtype)
        return change(layout.dequantize(parts, dtype))

    return seen, {"impl": decode, "role": "dense", **fields}


def test_the_reference_and_gradients_use_it(offer):
    seen, spec = decoding()
    offer(d=spec)
    weight = QuantizedTensor.build(*affine(), torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    y = F.linear(x, weight)
    assert dispatch.choose(*affine(), torch.float32).name(1) == "reference"
    seen.clear()
    y.sum().backward()
    assert seen == [torch.float32]
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(3, 64), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_away_is_admitted(offer, dtype):
    _, spec = decoding(lambda weight: torch.nextafter(weight, torch.full_like(weight, 9.0)))
    offer(d=spec)
    assert decoders(*affine(), dtype).spec.name == "d"


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight * 1.01,
        lambda weight: weight.index_fill(0, torch.tensor([7]), 0.0),
        lambda weight: weight.masked_fill(weight == weight[3, 5], float("nan")),
        lambda weight: weight.t().contiguous(),
        lambda weight: weight.double(),
    ],
    ids=["scaled", "row", "nan", "transposed", "dtype"],
)
@pytest.mark.filterwarnings("ignore:a kernel gave a wrong result")
def test_what_is_wrong_is_refused(offer, change):
    _, spec = decoding(change)
    offer(d=spec)
    layout, parts = affine()
    found = decoders(layout, parts, torch.float32)
    assert found.function is None and found.refused["d"].startswith(("differs from the reference", "returned"))
    assert torch.equal(dense(layout, parts, torch.float32), layout.dequantize(parts))


def test_what_fails_is_reported(offer):
    def broken(weight):
        raise RuntimeError("no such chip")

    _, spec = decoding(broken)
    offer(d=spec)
    layout, parts = affine()
    with pytest.warns(RuntimeWarning, match="no such chip"):
        assert torch.equal(dense(layout, parts, torch.float32), layout.dequantize(parts))


def test_the_highest_rank_that_fits_is_taken(offer):
    _, low = decoding(rank=1)
    _, high = decoding(rank=5, dtypes=frozenset({"bfloat16"}))
    offer(low=low, high=high)
    assert decoders(*affine(), torch.bfloat16).spec.name == "high"
    found = decoders(*affine(), torch.float32)
    assert found.spec.name == "low" and "takes bfloat16" in found.refused["high"]


def test_the_forced_reference_is_torch_alone(offer, monkeypatch):
    seen, spec = decoding()
    offer(d=spec)
    monkeypatch.setenv("QHUB_KERNEL", "reference")
    dispatch.forget()
    layout, parts = affine()
    dense(layout, parts, torch.float32)
    assert not seen


def test_no_product_is_expected_of_it(offer):
    _, spec = decoding()
    offer(d=spec)
    choice = dispatch.choose(*affine(), torch.float32)
    assert choice.name(1) == "reference" and "d" not in choice.refused
