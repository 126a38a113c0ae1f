"""The numbers of one layout in another's words: exact where they fit, refused with the reason where they do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhub.errors import LossError
from qhub.layouts import Affine, Float8, Grid, Lookup, Nested, Stacked, Transform
from qhub.layouts.translating import exact_weight, translate

N, K = 16, 64


def parts_of(layout: Any, seed: int = 0, scale_dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Return random parts of ``layout``, zeros whole."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, spec in layout.part_specs().items():
        if name == "qweight":
            if isinstance(layout, Float8):
                parts[name] = torch.randn(spec.shape, generator=generator).to(spec.dtypes[0])
            elif isinstance(layout, Affine):
                low, high = layout.code_range
                codes = torch.randint(low, high + 1, (layout.out_features, layout.in_features), generator=generator)
                parts[name] = layout.pack_codes(codes)
            else:
                parts[name] = torch.randint(0, 256, spec.shape, generator=generator).to(torch.uint8)
        elif name == "zeros":
            parts[name] = torch.randint(0, 2**layout.bits, spec.shape, generator=generator).to(torch.uint8)
        elif name == "table":
            parts[name] = torch.randn(spec.shape, generator=generator)
        elif name.endswith("perm"):
            parts[name] = torch.randperm(spec.shape[0], generator=generator).to(torch.int32)
        else:
            parts[name] = (torch.rand(spec.shape, generator=generator) + 0.5).to(scale_dtype)
    return parts


def affine(**changes: Any) -> Affine:
    given = {"bits": 4, "grid": Grid.along_k(32), "zero": "value", **changes}
    return Affine(out_features=N, in_features=K, **given)


def assert_exact(source: Any, target: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    parts = parts_of(source, seed)
    made = translate(source, parts, target)
    target.validate(made)
    assert torch.equal(exact_weight(source, parts), exact_weight(target, made))
    return made


@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    wider=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([8, 16, 32, 64]),
    finer=st.sampled_from([8, 16, 32, 64]),
    zero=st.sampled_from(["value", "constant"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_wider_codes_and_finer_groups_hold_every_affine_layout(bits, wider, group, finer, zero, seed):
    if wider < bits or group % finer:
        return
    source = affine(bits=bits, grid=Grid.along_k(group), zero=zero, zero_point=float(2 ** (bits - 1)))
    assert_exact(source, affine(bits=wider, grid=Grid.along_k(finer)), seed)


@pytest.mark.parametrize("grid", [Grid("flat", 1, 16), Grid("block", 4, 32), Grid("block", N, K), Grid("block", 1, K)])
def test_any_grid_of_whole_runs_becomes_groups_along_k(grid):
    assert_exact(affine(grid=grid), affine(grid=Grid.along_k(16)))


def test_signed_bytes_become_unsigned_ones_and_back():
    signed = affine(bits=8, signed=True, zero="constant", grid=Grid.along_k(K), unit=1 / 128)
    unsigned = affine(bits=8, zero="constant", zero_point=128.0, grid=Grid.along_k(K))
    made = assert_exact(signed, unsigned)
    again = translate(unsigned, made, signed)
    assert torch.equal(again["qweight"], parts_of(signed)["qweight"])


def test_middle_zeros_need_no_tensor():
    source = affine()
    parts = parts_of(source)
    parts["zeros"].fill_(8)
    made = translate(source, parts, affine(zero="constant", zero_point=8.0))
    assert "zeros" not in made


def test_a_formula_of_16_bits_is_compared_by_its_numbers():
    source = affine(math="scales")
    parts = parts_of(source)
    made = translate(source, parts, affine())
    assert torch.equal(made["scales"], parts["scales"])
    # The method that rounds to 16 bits computes something else from them, by at most that rounding.
    rounded, exact = source.dequantize(parts), affine().dequantize(made)
    assert (rounded - exact).abs().max() <= exact.abs().max() * 2.0**-10


def test_act_order_goes_along():
    order = (Transform("permute", "in"),)
    made = assert_exact(affine(transforms=order), affine(transforms=order, bits=8))
    assert made["in_perm"].dtype == torch.int32


def test_float8_scales_become_blocks_of_their_own():
    assert_exact(
        Float8(out_features=N, in_features=K, grid=Grid("block", N, K)),
        Float8(out_features=N, in_features=K, grid=Grid("block", 8, 32)),
    )


def test_tables_hold_integers_and_tables():
    table = Lookup(out_features=N, in_features=K, grid=Grid.along_k(16))
    assert_exact(affine(zero="constant", zero_point=8.0), table)
    assert_exact(dataclasses.replace(table, grid=Grid("flat", 1, 32)), table)


def test_matrices_on_top_of_each_other_become_one():
    top, bottom = (dataclasses.replace(affine(), out_features=rows) for rows in (4, 12))
    fused = Stacked.of([top, bottom], [parts_of(top, 1), parts_of(bottom, 2)])
    assert fused is not None
    layout, parts = fused
    made = translate(layout, parts, affine())
    assert torch.equal(affine().dequantize(made), layout.dequantize(parts))


def damaged(source: Any, **changes: Any) -> dict[str, torch.Tensor]:
    return {**parts_of(source), **changes}


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (affine(), affine(grid=Grid.along_k(64)), "differ within the target's groups"),
        (affine(), affine(zero="constant", zero_point=8.0), "codes lie between"),
        (affine(bits=8), affine(bits=4), "codes lie between"),
        (affine(transforms=(Transform("permute", "in"),)), affine(), "transforms permute"),
        (affine(), Lookup(out_features=N, in_features=K, grid=Grid.along_k(32)), "zero of its own"),
        (affine(), Float8(out_features=N, in_features=K, grid=Grid.along_k(32)), "cannot be said as float8"),
        (affine(), affine(scales_nested=Nested(group=4)), "which these are not made of"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(source, target, reason):
    with pytest.raises(LossError, match=reason):
        translate(source, parts_of(source), target)


def test_fractional_zeros_do_not_become_whole():
    source = affine()
    parts = damaged(source, zeros=parts_of(source)["zeros"].half() + 0.25)
    with pytest.raises(LossError, match="fractions"):
        translate(source, parts, affine(zero="constant", zero_point=8.0))
    # A target with float zeros takes them.
    assert translate(source, parts, affine(bits=8))["zeros"].is_floating_point()


def test_scales_that_16_bits_do_not_hold_stay_in_32():
    source = affine()
    parts = damaged(source, scales=parts_of(source)["scales"].float() + 1e-5)
    assert translate(source, parts, affine(bits=8))["scales"].dtype == torch.float32
