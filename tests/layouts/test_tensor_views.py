"""What keeps a weight quantized: moves, casts, copies, transposition, cuts, and storage of its parts in safetensors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qhub import QuantizedTensor
from qhub.errors import LayoutError
from qhub.layouts import Affine, Grid

from .cases import CASES, batch, case, fresh

# For operations that do not look into the layout, one of each kind will do.
KINDS = [
    "nf4_nested",
    "hqq3_axis0",
    "gptq4_act_order",
    "aqlm_1x16",
    "quip_e8p12_factor3",
    "e4m3_ragged_blocks",
    "nvfp4",
]


def _weight(name: str, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    one = case(name)
    return QuantizedTensor.build(one.layout, fresh(one.parts), dtype)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _same_parts(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    return list(one.parts) == list(other.parts) and all(
        torch.equal(_bytes(one.parts[name]), _bytes(other.parts[name])) for name in one.parts
    )


def _storages(weight: QuantizedTensor) -> set[int]:
    return {part.data_ptr() for part in weight.parts.values()}


@pytest.mark.parametrize("name", CASES)
def test_stands_for_the_dense_weight(name: str) -> None:
    one, weight = case(name), _weight(name)
    assert isinstance(weight, Tensor)
    assert tuple(weight.shape) == tuple(one.dense.shape)
    assert (weight.dtype, weight.device) == (torch.float32, torch.device("cpu"))
    assert weight.is_floating_point() and not weight.requires_grad
    assert torch.equal(weight.dequantize(), one.layout.dequantize(one.parts))
    assert weight.nbytes == sum(part.nbytes for part in one.parts.values())
    assert one.layout.kind in repr(weight)


@pytest.mark.parametrize("name", CASES)
def test_parts_survive_safetensors(name: str, tmp_path: Path) -> None:
    """The parts alone are the weight: no pickle, nothing kept elsewhere but the layout."""
    weight = _weight(name)
    save_file({part: value.contiguous() for part, value in weight.parts.items()}, tmp_path / "parts.safetensors")
    back = QuantizedTensor.build(weight.quant_layout, load_file(tmp_path / "parts.safetensors"), torch.float32)
    assert _same_parts(back, _weight(name)) or set(back.parts) == set(weight.parts)
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", KINDS)
def test_cast_keeps_the_codes(name: str, dtype: torch.dtype) -> None:
    weight = _weight(name)
    cast = weight.to(dtype)
    assert isinstance(cast, QuantizedTensor)
    assert cast.dtype == dtype
    assert _same_parts(cast, weight)
    assert torch.equal(cast.dequantize(), weight.dequantize(dtype))
    # No rounding on the way: back again, the weight is the same.
    assert torch.equal(cast.to(torch.float32).dequantize(), weight.dequantize())


def test_cast_spellings() -> None:
    weight = _weight("awq")
    for cast, dtype in (
        (weight.half(), torch.float16),
        (weight.bfloat16(), torch.bfloat16),
        (weight.double(), torch.float64),
    ):
        assert isinstance(cast, QuantizedTensor) and cast.dtype == dtype
    assert isinstance(weight.type_as(torch.zeros(1, dtype=torch.float16)), QuantizedTensor)
    assert weight.float() is weight
    # Not a float any more: a plain tensor of the dense values.
    whole = weight.to(torch.int32)
    assert not isinstance(whole, QuantizedTensor)
    assert torch.equal(whole, weight.dequantize().to(torch.int32))


@pytest.mark.parametrize("name", KINDS)
def test_meta(name: str) -> None:
    weight = _weight(name)
    meta = weight.to("meta")
    assert isinstance(meta, QuantizedTensor)
    assert meta.device.type == "meta" and meta.shape == weight.shape
    assert {part: (v.shape, v.dtype) for part, v in meta.parts.items()} == {
        part: (v.shape, v.dtype) for part, v in weight.parts.items()
    }
    assert meta.dequantize().device.type == "meta"
    assert torch.nn.functional.linear(torch.zeros(3, weight.shape[1], device="meta"), meta).shape == (
        3,
        weight.shape[0],
    )


@pytest.mark.parametrize("name", KINDS)
def test_clone_and_deepcopy_are_independent(name: str) -> None:
    weight = _weight(name)
    before = weight.dequantize()
    for twin in (weight.clone(), copy.deepcopy(weight), copy.deepcopy(torch.nn.Parameter(weight, requires_grad=False))):
        assert isinstance(twin, QuantizedTensor)
        assert _same_parts(twin, weight)
        assert not _storages(twin) & _storages(weight)
        twin.copy_(torch.zeros(twin.shape))
        assert torch.equal(weight.dequantize(), before)


def test_deepcopy_of_a_parameter_is_a_parameter() -> None:
    layer = torch.nn.Linear(256, 128, bias=False)
    layer.weight = torch.nn.Parameter(_weight("awq"), requires_grad=False)
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, torch.nn.Parameter) and isinstance(twin.weight, QuantizedTensor)
    assert list(dict(twin.named_parameters())) == ["weight"]
    assert not _storages(twin.weight) & _storages(layer.weight)


@pytest.mark.parametrize("name", KINDS)
def test_detach_and_data_are_aliases(name: str) -> None:
    weight = _weight(name)
    for alias in (
        weight.detach(),
        weight.data,
        weight.contiguous(),
        weight.view(weight.shape),
        weight[:],
        weight.view_as(weight),
    ):
        assert isinstance(alias, QuantizedTensor)
        assert _storages(alias) == _storages(weight)
    weight.detach().copy_(torch.zeros(weight.shape))
    assert _same_parts(weight, weight.detach())


@pytest.mark.parametrize("name", CASES)
def test_transposition(name: str) -> None:
    weight = _weight(name)
    dense = weight.dequantize()
    for turned in (
        weight.t(),
        weight.T,
        weight.mT,
        weight.transpose(0, 1),
        weight.transpose(-1, -2),
        weight.permute(1, 0),
    ):
        assert isinstance(turned, QuantizedTensor)
        assert turned.shape == dense.T.shape
        assert torch.equal(turned.dequantize(), dense.T)
    assert torch.equal(weight.t().t().dequantize(), dense)
    assert torch.equal(weight.t() @ torch.eye(dense.shape[0]), dense.T)


def test_transposed_experts() -> None:
    layout, parts, _ = batch("nf4_nested", 3)
    experts = QuantizedTensor.build(layout, parts, torch.float32)
    dense = experts.dequantize()
    turned = experts.transpose(1, 2)
    assert isinstance(turned, QuantizedTensor) and torch.equal(turned.dequantize(), dense.transpose(1, 2))
    assert isinstance(turned[1], QuantizedTensor) and torch.equal(turned[1].dequantize(), dense[1].T)
    # Other axes are no matrices any more.
    assert torch.equal(experts.transpose(0, 1), dense.transpose(0, 1))
    assert torch.equal(experts.permute(2, 0, 1), dense.permute(2, 0, 1))


@pytest.mark.parametrize("name", CASES)
def test_rows_and_columns_are_right_however_they_are_cut(name: str) -> None:
    """Quantized where the layout offers it, dense where not; the values are the same."""
    weight = _weight(name)
    dense = weight.dequantize()
    n, k = dense.shape
    for cut in (
        (slice(0, n // 2),),
        (slice(n // 2, n),),
        (slice(3, 5),),
        (slice(None), slice(0, k // 2)),
        (slice(0, n, 2),),
    ):
        piece = weight[cut]
        dense_piece = piece.dequantize() if isinstance(piece, QuantizedTensor) else piece
        assert torch.equal(dense_piece, dense[cut])
        offered = (
            cut[0].step is None
            and len(cut) == 1
            and weight.quant_layout.select_rows(weight.parts, cut[0].start, cut[0].stop)
        )
        assert isinstance(piece, QuantizedTensor) == bool(offered)
    halves = weight.chunk(2)
    joined = torch.cat(list(halves))
    assert torch.equal(joined.dequantize() if isinstance(joined, QuantizedTensor) else joined, dense)
    assert torch.equal(torch.as_tensor(weight[1]), dense[1])


def test_cat_of_fused_projections_stays_quantized() -> None:
    first, second = (
        QuantizedTensor.build(case("q4_k", i).layout, case("q4_k", i).parts, torch.float32) for i in range(2)
    )
    fused = torch.cat([first, second])
    assert isinstance(fused, QuantizedTensor)
    assert torch.equal(fused.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    # Along K there is no common row: dense.
    assert torch.equal(torch.cat([first, second], dim=1), torch.cat([first.dequantize(), second.dequantize()], dim=1))


@pytest.mark.parametrize("name", KINDS)
def test_flatten_and_unflatten(name: str) -> None:
    weight = _weight(name, torch.bfloat16).t()
    names, context = weight.__tensor_flatten__()
    hash(context)
    back = QuantizedTensor.__tensor_unflatten__({n: getattr(weight, n) for n in names}, context, weight.shape, None)
    assert (back.dtype, back.shape, back.transposed) == (weight.dtype, weight.shape, True)
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_build_refuses_parts_of_another_layout() -> None:
    with pytest.raises(LayoutError, match="needs the tensors"):
        QuantizedTensor.build(case("awq").layout, case("nf4_nested").parts, torch.float32)
    with pytest.raises(LayoutError, match="cannot be made from a Tensor"):
        QuantizedTensor(torch.zeros(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [Grid.along_k(32), Grid("block", 1, 64), Grid("block", 8, 32), Grid("flat", 1, 48)])
def test_looking_up_rows_gives_the_dense_rows(grid: Grid) -> None:
    """F.embedding on a quantized table, whether its rows have scales of their own or share some."""
    layout = Affine(out_features=24, in_features=64, bits=4, grid=grid, zero="value")
    parts = {name: torch.zeros(spec.shape).to(spec.dtypes[0]) for name, spec in layout.part_specs().items()}
    parts = layout.requantize(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), parts, "refit")
    table = QuantizedTensor.build(layout, parts, torch.float32)
    index = torch.tensor([[3, 0, 23], [3, 7, 7]])
    found = torch.nn.functional.embedding(index, table, padding_idx=0)
    assert found.shape == (2, 3, 64) and not isinstance(found, QuantizedTensor)
    assert torch.equal(found, table.dequantize()[index])
    assert (layout.take_rows(parts, index.flatten()) is not None) == (grid.kind == "block" and grid.rows == 1)
    assert torch.nn.functional.embedding(index[:0], table).shape == (0, 3, 64)
