"""Parts that do not fit a layout, and values that cannot be, are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qhub.errors import LayoutError
from qhub.layouts import Affine, Codebook, Grid, Lookup, PartSpec, Transform

from .cases import CASES, batch, case, fresh


@pytest.mark.parametrize("name", CASES)
def test_missing_part_is_named(name: str) -> None:
    layout, parts, *_ = case(name)
    for part in layout.part_specs():
        rest = {key: value for key, value in parts.items() if key != part}
        with pytest.raises(LayoutError, match=rf"missing \['{part}'\]"):
            layout.validate(rest)


@pytest.mark.parametrize("name", CASES)
def test_surplus_part_is_named(name: str) -> None:
    layout, parts, *_ = case(name)
    with pytest.raises(LayoutError, match=r"surplus \['bogus'\]"):
        layout.validate({**parts, "bogus": torch.zeros(1)})


@pytest.mark.parametrize("name", CASES)
def test_wrong_shape_is_refused(name: str) -> None:
    layout, parts, *_ = case(name)
    for part, value in parts.items():
        flat = value.reshape(-1)
        longer = torch.cat([flat.view(torch.uint8)] * 2).view(value.dtype)
        # The first part says what the batch is, so a leading dimension of its own is blamed on the next one.
        for wrong in (longer, flat[:-1], value[None]):
            with pytest.raises(LayoutError, match="has shape"):
                layout.validate({**parts, part: wrong})


@pytest.mark.parametrize("name", CASES)
def test_wrong_last_dimension_is_named(name: str) -> None:
    layout, parts, *_ = case(name)
    for part, value in parts.items():
        if value.ndim:
            with pytest.raises(LayoutError, match=f"'{part}' has shape"):
                layout.validate({**parts, part: value[..., :-1]})


@pytest.mark.parametrize("name", CASES)
def test_wrong_dtype_is_named(name: str) -> None:
    layout, parts, *_ = case(name)
    for part, value in parts.items():
        with pytest.raises(LayoutError, match=f"'{part}' has dtype torch.complex64"):
            layout.validate({**parts, part: torch.zeros(value.shape, dtype=torch.complex64)})


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_batch_must_agree(name: str) -> None:
    layout, parts, _ = batch(name, 3)
    specs: dict[str, PartSpec] = layout.part_specs()
    last = [part for part, spec in specs.items() if spec.batched][-1]
    with pytest.raises(LayoutError, match=f"'{last}' has shape"):
        layout.validate({**parts, last: parts[last][:2]})


@pytest.mark.parametrize("name", CASES)
def test_value_that_is_not_finite_is_named(name: str) -> None:
    layout, parts, *_ = case(name)
    for part, value in parts.items():
        if not value.dtype.is_floating_point:
            continue
        # E4M3FN has no infinity: a NaN is the one damage that it can show.
        for bad in (
            (float("nan"),) if value.dtype == torch.float8_e4m3fn else (float("nan"), float("inf"), -float("inf"))
        ):
            broken = value.float().reshape(-1).clone()
            broken[-1] = bad
            damaged = {**parts, part: broken.reshape(value.shape).to(value.dtype)}
            layout.validate(damaged)
            with pytest.raises(LayoutError, match=f"'{part}' holds NaN or infinity"):
                layout.check_values(damaged)


@pytest.mark.parametrize("name", CASES)
def test_meta_parts_are_valid_and_have_no_values(name: str) -> None:
    layout, parts, *_ = case(name)
    meta = {key: part.to("meta") for key, part in parts.items()}
    layout.validate(meta)
    layout.check_values(meta)


@pytest.mark.parametrize(
    ("place", "value"), [(0, 256), (0, -1), (5, None)], ids=["beyond the end", "negative", "twice the same"]
)
def test_permutation_must_be_one(place: int, value: int | None) -> None:
    layout, parts, *_ = case("gptq4_act_order")
    broken = fresh(parts)
    broken["in_perm"][place] = broken["in_perm"][place + 1] if value is None else value
    with pytest.raises(LayoutError, match="'in_perm' is no permutation of 256 features"):
        layout.check_values(broken)


def test_rotation_must_be_orthogonal() -> None:
    layout, parts, *_ = case("quip_e8p12_factor3")
    broken = fresh(parts)
    broken["in_hadamard"][0, 0] += 0.01
    with pytest.raises(LayoutError, match="'in_hadamard' is not orthogonal"):
        layout.check_values(broken)
    # A factor stored in half precision is as orthogonal as that precision allows.
    layout.check_values({**parts, "in_hadamard": parts["in_hadamard"].half()})


def test_divisor_of_zero_is_refused() -> None:
    layout, parts, *_ = case("nvfp4")
    with pytest.raises(LayoutError, match="'scales_super' divides the scales and holds 0"):
        layout.check_values({**parts, "scales_super": torch.zeros(1)})


def test_code_outside_its_codebook_is_refused() -> None:
    layout, parts, *_ = case("aqlm_3x6_2d_blocks")
    broken = fresh(parts)
    broken["codes"][1, 2, 1] = 64
    with pytest.raises(LayoutError, match="'codes' holds 64, outside the 64 entries of codebook 1"):
        layout.check_values(broken)
    # The other reading of the same byte: two's complement of 6 bits.
    broken["codes"][1, 2, 1] = -32
    layout.check_values(broken)
    broken["codes"][1, 2, 1] = -33
    with pytest.raises(LayoutError, match="'codes' holds -33"):
        layout.check_values(broken)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Affine(out_features=8, in_features=8, bits=9, grid=Grid.along_k(8)),
        lambda: Affine(out_features=8, in_features=8, bits=0, grid=Grid.along_k(8)),
        lambda: Affine(out_features=8, in_features=8, bits=4, signed=True, grid=Grid.along_k(8)),
        lambda: Lookup(out_features=8, in_features=8, bits=9, grid=Grid.along_k(8)),
        lambda: Codebook(out_features=8, in_features=8, nbits=(17,), out_group=1, in_group=8, grid=Grid.along_k(8)),
        lambda: Codebook(out_features=8, in_features=8, nbits=(), out_group=1, in_group=8, grid=Grid.along_k(8)),
        lambda: Codebook(out_features=8, in_features=12, nbits=(8,), out_group=1, in_group=8, grid=Grid.along_k(12)),
        lambda: Codebook(out_features=9, in_features=8, nbits=(8,), out_group=2, in_group=8, grid=Grid.along_k(8)),
        lambda: Grid("strided", 1, 7).scale_shape(8, 8),
    ],
)
def test_impossible_layout_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(LayoutError):
        make()


@pytest.mark.parametrize(("size", "factor"), [(96, 1), (96, 5), (80, 3)])
def test_rotation_size_must_be_a_factor_times_a_power_of_two(size: int, factor: int) -> None:
    layout = Affine(
        out_features=8,
        in_features=size,
        bits=4,
        grid=Grid.along_k(size),
        transforms=(Transform("hadamard", "in", factor),),
    )
    with pytest.raises(LayoutError, match="not a power of two"):
        layout.part_specs()
