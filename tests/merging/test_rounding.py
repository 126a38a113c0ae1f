"""Updates put onto a layout: single columns, errors that are spread, the choice between grids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhub.layouts import Affine, Codebook, Float8, Grid, Layout, Lookup, Nested, Transform
from qhub.merging.feedback import spread_errors
from qhub.merging.rounding import round_onto

N, K = 24, 64
TABLE = torch.tensor(
    [-1.0, -0.69, -0.52, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
)


def _layouts(features: int = K) -> dict[str, Layout]:
    size = {"out_features": N, "in_features": features}
    groups = Grid.along_k(32)
    return {
        "affine-constant": Affine(**size, bits=4, grid=groups, zero_point=8.0),
        "affine-value": Affine(**size, bits=3, grid=groups, zero="value"),
        "affine-offset": Affine(**size, bits=2, grid=groups, zero="offset"),
        "affine-unit": Affine(**size, bits=8, grid=Grid("block", 1, K), signed=True, unit=1 / 127),
        "affine-strided": Affine(**size, bits=4, grid=Grid("strided", 1, 64), zero="value"),
        "affine-order": Affine(**size, bits=4, grid=groups, zero_point=8.0, transforms=(Transform("permute", "in"),)),
        "affine-scaled": Affine(**size, bits=4, grid=groups, zero_point=8.0, transforms=(Transform("scale", "in"),)),
        "affine-rotated": Affine(
            **size, bits=4, grid=groups, zero_point=8.0, transforms=(Transform("hadamard", "in"),)
        ),
        "lookup": Lookup(**size, grid=groups),
        "lookup-flat": Lookup(**size, grid=Grid("flat", 1, 48)),
        "codebook": Codebook(**size, nbits=(6, 6), out_group=1, in_group=8, grid=Grid("block", 1, features)),
        "codebook-signs": Codebook(**size, nbits=(7,), out_group=1, in_group=4, grid=groups, signs=True),
        "float8": Float8(**size, grid=Grid("block", 8, 32)),
    }


def _stored(layout: Layout, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a weight that lies on the layout, and its parts."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, torch.Tensor] = {}
    for name, spec in layout.part_specs().items():
        dtype = torch.float32 if torch.float32 in spec.dtypes else spec.dtypes[0]
        parts[name] = torch.zeros(spec.shape).to(dtype)
    if "table" in parts:
        parts["table"] = TABLE.clone()
    if "codebooks" in parts:
        parts["codebooks"] = torch.randn(parts["codebooks"].shape, generator=generator)
        parts["codebooks"] = parts["codebooks"].abs() if "signs" in parts else parts["codebooks"]
        parts["scales"] = torch.ones(parts["scales"].shape)
    for transform in layout.transforms:
        if transform.kind == "permute":
            parts[transform.part] = torch.randperm(layout.in_features, generator=generator).to(
                parts[transform.part].dtype
            )
        if transform.kind == "scale":
            parts[transform.part] = 0.5 + torch.rand(layout.in_features, generator=generator)
    weight = torch.randn(N, layout.in_features, generator=generator)
    parts = layout.requantize(weight, parts, "refit")
    return layout.dequantize(parts), parts


def _inputs(rows: int = 256, features: int = K) -> torch.Tensor:
    """Return inputs whose features are correlated, as those of a model are."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(rows, 4, generator=generator) @ torch.randn(4, features, generator=generator)
    return common + 0.1 * torch.randn(rows, features, generator=generator)


@pytest.mark.parametrize("name", list(_layouts()))
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_columns_round_as_the_layout_does(name: str, seed: int) -> None:
    """Column by column gives the values that the nearest codes of the whole matrix stand for."""
    layout = _layouts()[name]
    _, parts = _stored(layout, seed)
    wanted = torch.randn(N, K, generator=torch.Generator().manual_seed(seed + 1))
    columns = layout.columns(parts)
    assert columns is not None
    width = columns.width
    slices = [k if width == 1 else slice(k, k + width) for k in range(0, K, width)]
    got = torch.cat(
        [columns.nearest(k, wanted.t()[at]).reshape(width, N) for k, at in zip(range(0, K, width), slices, strict=True)]
    ).t()
    whole = layout.decode({**parts, **layout.nearest(wanted, parts)})
    # Between two codes either is right: compare how far each is, with room for float32's rounding of the quotient.
    assert torch.allclose((got - wanted).abs(), (whole - wanted).abs(), atol=2e-6 * float(wanted.abs().max()))
    on_grid = layout.decode({**parts, **layout.parts_of_columns(columns, got, parts)})
    assert torch.allclose(on_grid, got, atol=1e-6 * float(got.abs().max()))


@pytest.mark.parametrize("name", list(_layouts()))
def test_what_is_stored_already_stays_bit_for_bit(name: str) -> None:
    """A weight that the parts stand for gets these very parts back."""
    layout = _layouts()[name]
    weight, parts = _stored(layout)
    found = round_onto(weight, layout, parts, inputs=_inputs())
    assert found.grid == "exact" and found.error < 1e-5
    assert all(torch.equal(found.parts[part].float(), parts[part].float()) for part in parts)


@pytest.mark.parametrize("name", ["affine-constant", "affine-value", "affine-order", "affine-scaled", "lookup"])
def test_spread_errors_keep_a_small_update_in_the_output(name: str) -> None:
    """An update far below the grid's step is lost to the nearest codes, and mostly kept in fresh outputs otherwise."""
    wide = 512
    layout = _layouts(wide)[name]
    weight, parts = _stored(layout)
    generator = torch.Generator().manual_seed(5)
    update = torch.randn(N, 2, generator=generator) @ torch.randn(2, wide, generator=generator)
    update *= 0.05 * weight.norm() / update.norm()
    target = weight + update
    seen = _inputs(512, wide)
    found = round_onto(target, layout, parts, "keep", seen[:256])
    assert found.spread and found.error < 0.7 * found.update
    fresh = seen[256:].double()
    lost = (fresh @ update.double().T).norm()
    left = (fresh @ (layout.dequantize(found.parts).double() - target.double()).T).norm()
    nearest = layout.dequantize(layout.requantize(target, parts, "keep")).double()
    plain = (fresh @ (nearest - target.double()).T).norm()
    assert left < 0.7 * plain and left < 0.7 * lost
    layout.validate(found.parts)


@pytest.mark.parametrize("name", ["codebook", "codebook-signs"])
def test_vectors_spread_their_errors_too(name: str) -> None:
    """New values on old codebooks: the output is nearer than with the nearest vectors, and the codes say the same."""
    layout = _layouts(512)[name]
    weight, parts = _stored(layout)
    target = weight + 0.5 * torch.randn(N, 512, generator=torch.Generator().manual_seed(6))
    seen = _inputs(512, 512)
    columns = layout.columns(parts)
    values = spread_errors(target, seen[:256], columns)
    written = {**parts, **layout.parts_of_columns(columns, values, parts)}
    layout.validate(written)
    assert torch.allclose(layout.dequantize(written), values, atol=1e-5)
    nearest = layout.dequantize(layout.requantize(target, parts, "keep"))
    spread, plain = (float((seen[256:] @ (one - target).T).norm()) for one in (values, nearest))
    assert spread < 0.5 * plain


def test_without_inputs_the_error_is_the_weights() -> None:
    """Nothing is spread, and the error is that of the matrix, in float64."""
    layout = _layouts()["affine-value"]
    weight, parts = _stored(layout)
    target = weight + 0.3 * torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    found = round_onto(target, layout, parts)
    off = layout.dequantize(found.parts).double() - target.double()
    assert not found.spread and found.rows == 0
    assert found.error == pytest.approx(float(off.norm() / target.double().norm()), rel=1e-5)
    kept, refitted = (round_onto(target, layout, parts, grid) for grid in ("keep", "refit"))
    assert found.error <= min(kept.error, refitted.error)


def test_a_constant_of_each_group_goes_into_float_zeros_exactly() -> None:
    """What is the same for all weights of a group moves the grid: nothing of it is lost, and no code changes."""
    layout = _layouts()["affine-value"]
    weight, parts = _stored(layout)
    shift = torch.randn(N, K // 32, generator=torch.Generator().manual_seed(3)).repeat_interleave(32, dim=1)
    found = round_onto(weight + 0.05 * shift, layout, parts, "best")
    assert found.grid == "zeros" and found.error < 1e-6
    assert torch.equal(found.parts["qweight"], parts["qweight"])
    assert torch.equal(found.parts["scales"], parts["scales"])
    offset = _layouts()["affine-offset"]
    weight, parts = _stored(offset)
    found = round_onto(weight + 0.05 * shift, offset, parts, "best")
    assert found.grid == "zeros" and found.error < 1e-6


def test_grids_that_cannot_move_do_not() -> None:
    """Integer zeros, nested ones and constant ones are left alone."""
    layout = _layouts()["affine-constant"]
    _, parts = _stored(layout)
    assert layout.moved(torch.ones(N, K), parts) is None
    whole = Affine(out_features=N, in_features=K, bits=4, grid=Grid.along_k(32), zero="value")
    parts = {**parts, "zeros": torch.full((N, 2), 8, dtype=torch.uint8)}
    assert whole.moved(torch.ones(N, K), parts) is None
    nested = Affine(
        out_features=N, in_features=K, bits=4, grid=Grid.along_k(32), zero="value", zeros_nested=_a_nested()
    )
    assert nested.moved(torch.ones(N, K), {}) is None


def _a_nested() -> Nested:
    return Nested()


def test_the_solver_matches_its_definition_in_float64() -> None:
    """Each column's code is the nearest to its weight plus what the columns before it make up for."""
    layout = _layouts()["affine-constant"]
    weight, parts = _stored(layout)
    target = weight + 0.2 * torch.randn(N, K, generator=torch.Generator().manual_seed(4))
    inputs = _inputs()
    columns = layout.columns(parts)
    got = spread_errors(target, inputs, columns)
    moments = inputs.double().T @ inputs.double()
    moments /= moments.diagonal().mean()
    moments += 0.01 * torch.eye(K, dtype=torch.float64)
    done: list[int] = []
    work, values = target.double().clone(), torch.zeros(N, K, dtype=torch.float64)
    for k in range(K):
        values[:, k] = columns.nearest(k, work[:, k].float()).double()
        done.append(k)
        rest = list(range(k + 1, K))
        if rest:
            # The best change of the rest, given all errors so far: least squares with the damped moments.
            error = values[:, done] - target.double()[:, done]
            answer = torch.linalg.solve(moments[rest][:, rest], moments[rest][:, done] @ error.T).T
            work[:, rest] = target.double()[:, rest] - answer
    # A column that lies between two codes may fall to either side in float32, and the ones after it follow.
    assert float((got.double() != values).any(dim=1).float().mean()) <= 0.1
