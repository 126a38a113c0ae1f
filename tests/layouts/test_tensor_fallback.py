"""Every other operator runs on the dequantized weight: the same result as with the dense tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qhub import QuantizedTensor

from .cases import case, fresh

KINDS = ["nf4_ragged", "int8_outliers", "hqq3_axis0", "gptq4_act_order", "quip_e8p12", "aqlm_2x8", "e4m3_ragged_blocks"]

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda w: w.sum(),
    "sum of rows": lambda w: w.sum(dim=1),
    "norm": lambda w: w.norm(),
    "row norms": lambda w: torch.linalg.vector_norm(w, dim=1),
    "twice": lambda w: w * 2,
    "reflected": lambda w: 1 - w,
    "plus itself": lambda w: w + w,
    "times a row": lambda w: w * torch.linspace(0, 1, w.shape[1]),
    "product on its left": lambda w: torch.matmul(w, torch.eye(w.shape[1])[:, :7]),
    "product with a vector": lambda w: w @ torch.ones(w.shape[1]),
    "product of two": lambda w: w @ w.t(),
    "added product": lambda w: torch.addmm(torch.zeros(2, w.shape[0]), torch.ones(2, w.shape[1]), w.t()),
    "einsum": lambda w: torch.einsum("nk,mk->mn", w, torch.ones(2, w.shape[1])),
    "embedding": lambda w: F.embedding(torch.tensor([[0, 3], [2, 0]]), w),
    "abs max": lambda w: w.abs().max(),
    "flattened": lambda w: w.reshape(-1),
    "column": lambda w: w[:, 3],
    "masked": lambda w: w[w > 0],
    "indexed": lambda w: w[torch.tensor([1, 0])],
    "stacked with dense": lambda w: torch.stack([w, torch.zeros(w.shape)]),
    "joined with dense": lambda w: torch.cat([w, torch.zeros(w.shape)]),
    "singular values": lambda w: torch.linalg.svdvals(w),
    "zeros like": lambda w: torch.zeros_like(w),
    "comparison": lambda w: w == w.clone(),
    "softmax": lambda w: w.softmax(-1),
    "convolution": lambda w: F.conv1d(torch.ones(1, 1, w.shape[1] + 2), w[:, None, :]),
    "where": lambda w: torch.where(w > 0, w, -w),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_result_is_that_of_the_dense_tensor(operation: Callable[[Tensor], Tensor]) -> None:
    for name in KINDS:
        one = case(name)
        weight = QuantizedTensor.build(one.layout, one.parts, torch.float32)
        found, expected = operation(weight), operation(one.layout.dequantize(one.parts))
        assert not isinstance(found, QuantizedTensor), name
        assert found.dtype == expected.dtype
        # Other strides or a kernel's product add up in another order; sums of 32768 float32 numbers differ by some
        # 1e-5.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.float().abs().max()))


def test_properties() -> None:
    one = case("nf4_nested")
    weight = QuantizedTensor.build(one.layout, one.parts, torch.float32)
    assert weight.numel() == one.dense.numel()
    assert weight.dim() == 2 and len(weight) == one.dense.shape[0] and weight.size(1) == one.dense.shape[1]
    assert weight.stride() == one.dense.stride()
    assert not weight.is_sparse and not weight.is_complex()
    assert weight[0, 0].item() == one.layout.dequantize(one.parts)[0, 0].item()


def test_gradient_flows_through_the_dense_operators() -> None:
    one = case("gptq4_act_order")
    weight = QuantizedTensor.build(one.layout, one.parts, torch.float32)
    dense = weight.dequantize()
    y = torch.randn(dense.shape[1], 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (torch.matmul(weight, y).square().sum() + (weight * y.sum()).sum()).backward()
    assert y.grad is not None
    found, y.grad = y.grad.clone(), None
    (torch.matmul(dense, y).square().sum() + (dense * y.sum()).sum()).backward()
    torch.testing.assert_close(found, y.grad)


def test_out_argument_writes_the_weight() -> None:
    one = case("hqq8_axis1")
    weight = QuantizedTensor.build(one.layout, fresh(one.parts), torch.float32)
    dense = weight.dequantize()
    torch.mul(dense, 2.0, out=weight)
    # 8 bits over the range of a group: half a step.
    torch.testing.assert_close(weight.dequantize(), 2 * dense, rtol=0, atol=float(dense.abs().max()) * 4 / 255)
