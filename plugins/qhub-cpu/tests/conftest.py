"""Random quantized matrices of every layout that the kernels take, each beside its dense weight in float64."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qhub.layouts import Activation, Affine, Grid, Layout, Lookup, Nested, Transform
from qhub.layouts.packing import pack

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed: there is nothing to test", allow_module_level=True)

# Unit roundoff of each input dtype.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass
class Case:
    """Is one matrix.

    ``dense``: (N, K) float64. ``terms``: (N, K) float64, the magnitudes that a weight's formula adds up, which is what
    float32 roundings of the weight are relative to.
    """

    layout: Any
    parts: dict[str, Tensor]
    dense: Tensor
    terms: Tensor

    def bound(self, x: Tensor, weight_unit: float = 0.0) -> Tensor:
        """Return the largest error of each output that rounding can explain, for ``x`` (M, K) float64.

        A weight has at most six float32 roundings; a sum of 32 partial sums of K/32 products at most K/32 + 32 (Higham
        2002, section 4.2: a product's error grows by one unit roundoff an addition). ``weight_unit``: of the dtype
        that weights are rounded to before the product; 0: none.
        """
        roundings = (6 + x.shape[1] / 32 + 32) * UNIT[torch.float32]
        return (roundings + weight_unit) * (x.abs() @ self.terms.T) * (1 + 2.0**-6)


def _generator(*seed: Any) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def affine(
    bits: int,
    n: int = 33,
    k: int = 192,
    group: int = 64,
    zero: str = "value",
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Case:
    """Return an Affine matrix; ``dtype``: of the scales and zeros."""
    random = _generator("affine", bits, n, k, group, zero)
    signed = fields.get("signed", False)
    low, high = (-128, 128) if signed else (0, 2**bits)
    q = torch.randint(low, high, (n, k), generator=random)
    grid = Grid("block", fields.pop("rows", 1), group)
    layout = Affine(out_features=n, in_features=k, bits=bits, grid=grid, zero=zero, **fields)  # type: ignore[arg-type]
    shape = layout.scale_shape
    scales = _uniform(shape, 0.01, 0.1, random).to(dtype)
    parts = {"qweight": layout.pack_codes(q), "scales": scales}
    s, z = _spread(scales.double(), layout), torch.zeros(n, k, dtype=torch.float64)
    if zero != "constant":
        top = 2**bits - 1 if zero == "value" else 0.5
        parts["zeros"] = _uniform(shape, 0.0, top, random).to(dtype)
        z = _spread(parts["zeros"].double(), layout)
    round_ = _rounding(dtype if layout.math == "scales" else torch.float32)
    if zero == "constant":
        dense, terms = round_(round_(q - layout.zero_point) * s), (q.abs() + abs(layout.zero_point)) * s
    elif zero == "value":
        dense, terms = round_(round_(q - z) * s), (q + z) * s
    else:
        around = q - layout.zero_point
        dense, terms = round_(round_(around * s) + z), around.abs() * s + z
    return Case(layout, parts, round_(dense * layout.unit) if layout.unit != 1 else dense, terms * layout.unit)


def _rounding(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    # Sums and products of 8-bit codes and 16-bit floats fit a float32, so that this rounds once.
    return (lambda v: v) if dtype == torch.float32 else (lambda v: v.float().to(dtype).double())


def _spread(scale: Tensor, layout: Any) -> Tensor:
    grid = layout.grid
    full = scale.repeat_interleave(grid.rows, 0).repeat_interleave(grid.cols, 1)
    return full[: layout.out_features, : layout.in_features]


def lookup(bits: int = 4, n: int = 33, k: int = 192, group: int = 64, nested: str | None = None) -> Case:
    """Return a Lookup matrix; ``nested``: None, "table" (QLoRA's), "integers" (IQ4_XS') or "float8" (NVFP4's)."""
    random = _generator("lookup", bits, n, k, group, nested)
    q = torch.randint(0, 2**bits, (n, k), generator=random)
    table = _uniform((2**bits,), -1, 1, random)
    shape = (n, -(-k // group))
    count = shape[0] * shape[1]
    parts = {"qweight": pack(q, bits), "table": table}
    how = None
    if nested is None:
        parts["scales"] = _uniform(shape, 0.1, 1, random)
        scales = parts["scales"].double()
    elif nested == "table":
        how = Nested("uint8", group=64, table=True, offset=True)
        codes = torch.randint(0, 256, shape, generator=random)
        parts |= {
            "scales": codes.to(torch.uint8),
            "scales_super": _uniform((-(-count // 64),), 0.1, 0.3, random),
            "scales_table": _uniform((256,), -1, 1, random).sort().values,
            "scales_offset": torch.tensor(0.4),
        }
        first = parts["scales_table"].double()[codes].reshape(-1)
        second = parts["scales_super"].double().repeat_interleave(64)[:count]
        scales = (first * second + parts["scales_offset"].double()).reshape(shape)
    elif nested == "integers":
        how = Nested("int8", group=8, bits=6)
        codes = torch.randint(-32, 32, shape, generator=random)
        parts |= {"scales": codes.to(torch.int8), "scales_super": _uniform((-(-count // 8),), 0.01, 0.1, random).half()}
        second = parts["scales_super"].double().repeat_interleave(8)[:count]
        scales = (codes.reshape(-1) * second).reshape(shape)
    else:
        how = Nested("float8_e4m3fn", group=0, divide=True)
        codes = _uniform(shape, 1, 400, random).to(torch.float8_e4m3fn)
        parts |= {"scales": codes, "scales_super": torch.tensor([450.0])}
        scales = codes.double() / 450.0
    layout = Lookup(out_features=n, in_features=k, bits=bits, grid=Grid.along_k(group), scales_nested=how)
    wide = _spread(scales, layout)
    # An offset cancels against the code it is added to: one scale is a sum of magnitudes of up to 0.7.
    terms = torch.full((n, k), 0.7, dtype=torch.float64) if nested == "table" else wide.abs()
    return Case(layout, parts, table.double()[q] * wide, terms)


def int8(n: int = 33, k: int = 192, threshold: float = 3.0) -> Case:
    """Return LLM.int8() rows; inputs are rounded to int8 but for columns that reach ``threshold``."""
    fields = {"signed": True, "unit": 1 / 127, "activation": Activation("int8", threshold)}
    return affine(8, n, k, k, "constant", **fields)


def _permuted(case: Case) -> Case:
    k = case.layout.in_features
    perm = torch.randperm(k, generator=_generator("perm", k))
    dense, terms = torch.empty_like(case.dense), torch.empty_like(case.terms)
    dense[:, perm], terms[:, perm] = case.dense, case.terms
    layout = replace(case.layout, transforms=(Transform("permute", "in"),))
    return Case(layout, {**case.parts, "in_perm": perm.to(torch.int32)}, dense, terms)


def _scaled(case: Case) -> Case:
    random = _generator("scaled")
    into, out = (_uniform((size,), 0.5, 2, random) for size in (case.layout.in_features, case.layout.out_features))
    factor = out.double()[:, None] * into.double()
    layout = replace(case.layout, transforms=(Transform("scale", "in"), Transform("scale", "out")))
    return Case(layout, {**case.parts, "in_scale": into, "out_scale": out}, case.dense * factor, case.terms * factor)


CASES: dict[str, Callable[[], Case]] = {
    "nf4": lambda: lookup(),
    "nf4 nested": lambda: lookup(nested="table"),
    "nf4 ragged": lambda: lookup(k=200, nested="table"),
    "iq4_xs": lambda: lookup(group=32, nested="integers"),
    "nvfp4": lambda: lookup(group=16, nested="float8"),
    "lookup of 2 bits": lambda: lookup(2),
    "lookup of 3 bits, one group a row of 100": lambda: lookup(3, k=100, group=100),
    **{
        f"hqq {bits}": (lambda bits=bits: affine(bits, dtype=torch.bfloat16, math="scales")) for bits in (1, 2, 3, 4, 8)
    },
    "hqq 4 in float16": lambda: affine(4, dtype=torch.float16, math="scales"),
    "hqq 4 of one scale": lambda: affine(4, rows=33, group=192),
    "gptq 4 symmetric, ragged": lambda: affine(
        4, k=200, group=32, zero="constant", zero_point=8.0, dtype=torch.float16
    ),
    "gptq 3 act-order": lambda: _permuted(affine(3, dtype=torch.float16)),
    "awq 4 scaled": lambda: _scaled(affine(4, dtype=torch.float16)),
    "offset 5": lambda: affine(5, group=32, zero="offset"),
    "offset 4 around the middle code": lambda: affine(4, group=32, zero="offset", zero_point=8.0, dtype=torch.bfloat16),
    "6 bits of groups of 16": lambda: affine(6, group=16, zero="constant", zero_point=32.0),
    "7 bits, ragged": lambda: affine(7, k=184, group=32, zero="value"),
    "8 bits of 2-D blocks": lambda: affine(8, rows=16, group=64, zero="constant", zero_point=128.0),
    "8 bits signed": lambda: affine(8, k=100, group=100, zero="constant", signed=True, unit=1 / 127),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each layout in turn."""
    return CASES[request.param]()


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each input dtype in turn."""
    return request.param


@pytest.fixture
def make() -> dict[str, Callable[..., Case]]:
    """The functions that make a case of one's own: "affine", "lookup", "int8"."""
    return {"affine": affine, "lookup": lookup, "int8": int8}


@pytest.fixture
def inputs() -> Callable[..., tuple[Tensor, Tensor]]:
    """A function that returns x (m, K) of both signs and a bias (N,) for a layout, of a dtype."""

    def build(layout: Layout, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        random = _generator("inputs", m, layout.in_features)
        x = torch.randn(m, layout.in_features, generator=random)
        return x.to(dtype), torch.randn(layout.out_features, generator=random).to(dtype)

    return build


@pytest.fixture
def unit() -> dict[torch.dtype, float]:
    """The unit roundoff of each dtype."""
    return UNIT
