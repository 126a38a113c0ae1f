"""Products with vectors picked by codes, in triton's interpreter: against the layout in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qhub_triton.codebook.lattice import words_of
from qhub_triton.codebook.linear import bind, dequantize
from qhub_triton.codebook.reading import Side, accepts, reading
from qhub_triton.codebook.turning import Plan, Turning

from qhub.kernels import Problem
from qhub.layouts import Codebook, Grid, Transform
from qhub.layouts.vectors import FoldedBook, PlainBook

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has tests of its own: tests/gpu")

# The interpreter's products are in float32, of inputs with 11 bits and sums of some hundred terms; what is left is the
# rounding of the result to float16, 2^-12 at most, and of an input that was rotated.
_CLOSE = 2.0**-11


def _layout(n: int, k: int, nbits: tuple[int, ...], width: int = 8, **more: object) -> Codebook:
    more.setdefault("grid", Grid("block", 1, k))
    return Codebook(out_features=n, in_features=k, nbits=nbits, out_group=1, in_group=width, **more)  # type: ignore[arg-type]


def _parts(layout: Codebook, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, spec in layout.part_specs().items():
        if name == "codes":
            codes = torch.stack(
                [
                    torch.randint(0, 2**bits, spec.shape[:2], generator=generator, dtype=torch.int64)
                    for bits in layout.nbits
                ],
                dim=-1,
            )
            parts[name] = layout.stored_codes(codes)
        elif name.endswith("hadamard"):
            q = spec.shape[0]
            # Twelve is the smallest order that is no power of two; its first construction by Paley.
            assert q == 12
            squares = {j * j % 11 for j in range(1, 11)}
            legendre = torch.tensor([0, *(1 if j in squares else -1 for j in range(1, 11))])
            core = legendre[(torch.arange(11).unsqueeze(1) - torch.arange(11)) % 11]
            matrix = torch.ones(12, 12, dtype=torch.int64)
            matrix[0, 1:] = -1
            matrix[1:, 1:] = core + torch.eye(11, dtype=torch.int64)
            parts[name] = matrix.to(torch.int8)
        elif name == "codebooks":
            parts[name] = torch.randn(spec.shape, generator=generator).to(torch.float16)
        else:
            parts[name] = (0.5 + torch.rand(spec.shape, generator=generator)).to(torch.float16)
    layout.validate(parts)
    return parts


def _wanted(x: torch.Tensor, layout: Codebook, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    return x.double() @ layout.dequantize(parts).double().T


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("nbits", "width", "n", "k"),
    [
        ((8, 8), 8, 40, 136),
        ((8, 8), 8, 33, 64),
        ((10,), 8, 8, 72),
        ((8,), 4, 20, 44),
        ((5, 5, 5), 8, 7, 40),
        ((9, 3), 16, 5, 48),
        ((16,), 8, 4, 32),
    ],
)
@pytest.mark.parametrize("m", [1, 3])
def test_sums_of_vectors(nbits: tuple[int, ...], width: int, n: int, k: int, m: int) -> None:
    layout = _layout(n, k, nbits, width)
    parts = _parts(layout)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(torch.float16)
    found = bind(layout, parts, torch.float16)(x, bias)
    assert found.shape == (m, n) and found.dtype == torch.float16
    assert _error(found, _wanted(x, layout, parts) + bias.double()) < _CLOSE


def test_many_rows_are_multiplied_densely() -> None:
    layout = _layout(24, 64, (8, 8))
    parts = _parts(layout)
    x = torch.randn(19, 64, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    # The weight is rounded to float16 as well.
    assert _error(bind(layout, parts, torch.float16)(x, None), _wanted(x, layout, parts)) < 2 * _CLOSE


_QUIP = {
    "shared": True,
    "folded": (0.25,),
    "transforms": (
        Transform("divide", "in"),
        Transform("scale", "in"),
        Transform("hadamard", "in"),
        Transform("hadamard", "out"),
        Transform("scale", "out"),
    ),
}


def _quip(n: int, k: int, nbits: tuple[int, ...] = (16,), factors: tuple[int, int] = (1, 1)) -> Codebook:
    transforms = tuple(
        replace(t, factor=factors[t.side == "out"]) if t.kind == "hadamard" else t for t in _QUIP["transforms"]
    )
    more = {**_QUIP, "transforms": transforms, "grid": Grid("block", n, k)}
    if len(nbits) > 1:
        more |= {"folded": (0.25, 0.25 if nbits[1] == 16 else None), "divisors": (1.0, 3.45)}
    return _layout(n, k, nbits, **more)


@pytest.mark.parametrize(
    ("n", "k", "nbits", "factors"),
    [
        (64, 128, (16,), (1, 1)),
        (32, 512, (16, 16), (1, 1)),
        (32, 64, (16, 8), (1, 1)),
        (192, 64, (16,), (1, 12)),
        (64, 768, (16,), (12, 1)),
    ],
)
@pytest.mark.parametrize("m", [1, 2, 18])
def test_rotations(n: int, k: int, nbits: tuple[int, ...], factors: tuple[int, int], m: int) -> None:
    layout = _quip(n, k, nbits, factors)
    parts = _parts(layout)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(torch.float16)
    found = bind(layout, parts, torch.float16)(x, bias)
    assert _error(found, _wanted(x, layout, parts) + bias.double()) < _CLOSE


def _rotated(v: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of v (M, size) rotated, in float64: by the factor, and by Sylvester's matrices of two."""
    q = 1 if factor is None else factor.shape[0]
    v = v.double().unflatten(-1, (q, -1))
    power = v.shape[-1]
    if factor is not None:
        v = factor.double() @ v / (1.0 if factor.is_floating_point() else q**0.5)
    for bit in range(power.bit_length() - 1):
        v = v.unflatten(-1, (-1, 2, 1 << bit))
        v = torch.stack([v[..., 0, :] + v[..., 1, :], v[..., 0, :] - v[..., 1, :]], -2).flatten(-3)
    return v.flatten(-2) / power**0.5


def _factor(q: int, floating: bool) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(3)
    if q == 1:
        return None
    if floating:
        return torch.linalg.qr(torch.randn(q, q, generator=generator))[0].contiguous()
    # Nothing asks whether the matrix is orthogonal.
    return (torch.randint(0, 2, (q, q), generator=generator) * 2 - 1).to(torch.int8)


def _turning(size: int, q: int, floating: bool, narrow: bool, divide: bool) -> tuple[Turning, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    side = "in" if narrow else "out"
    rotate = Transform("hadamard", side, factor=q)
    scale, divisor = Transform("scale", side), Transform("divide", side)
    parts: dict[str, torch.Tensor] = {scale.part: 0.5 + torch.rand(size, generator=generator)}
    if q > 1:
        parts[rotate.part] = _factor(q, floating)
    if divide:
        parts[divisor.part] = 0.5 + torch.rand(size, generator=generator)
    place = {"before" if narrow else "after": scale}
    found = Side(divide=divisor if divide else None, rotate=rotate, **place)
    return Turning(found, size, parts, -1, narrow, True), {
        "scale": parts[scale.part], "divisor": parts[divisor.part] if divide else torch.ones(size),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "q"), [(4096, 1), (14336, 28), (28672, 28), (5120, 20), (11008, 172), (44032, 172), (53248, 52)]
)
def test_every_program_has_a_place_for_its_sums(size: int, q: int) -> None:
    turning, _ = _turning(size, q, False, narrow=True, divide=False)
    for m in (1, 2, 3, 16):
        plan = turning.plan(m)
        assert -(-(size // plan.b) // plan.rows) <= turning.programs


_SIZES = [(16, 1, False), (1024, 1, False), (12 * 16, 12, False), (28 * 32, 28, False), (6 * 32, 6, True)]


@pytest.mark.parametrize(("size", "q", "floating"), _SIZES)
@pytest.mark.parametrize(("m", "plan"), [(1, None), (2, Plan(16, 8, 4)), (2, Plan(16, 1, 8)), (5, None), (17, None)])
def test_inputs_are_rotated_scaled_and_summed(size: int, q: int, floating: bool, m: int, plan: Plan | None) -> None:
    turning, known = _turning(size, q, floating, narrow=True, divide=size == 1024)
    if plan is not None:
        turning.plans[m] = plan
        # Eight rows each: fewer programs than there are places for sums.
        if plan.rows == 1:
            turning.plans[1] = plan
    x = torch.randn(m, size, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    out = torch.empty(m, size, dtype=torch.float16)
    lengths = torch.empty(m)
    sums = torch.full((m, turning.programs, 2), torch.nan)
    turning(x, out, lengths, sums, None, None, 1, False)
    wanted = _rotated(x / known["divisor"] * known["scale"], _factor(q, floating))
    assert _error(out.double() * lengths.unsqueeze(1), wanted) < 2.0**-11
    # No number is left out, none is infinite, and none much smaller than float16 has room for.
    assert torch.isfinite(out).all() and lengths.log2().frac().eq(0).all()
    if m <= 16:
        fours = out.double().unflatten(-1, (-1, 2, 2)).sum(-1).sum(-2)
        assert (sums.double().sum(1) - fours).abs().max() <= 1e-5 * out.double().abs().sum(-1).max()


@pytest.mark.parametrize(("size", "q", "floating"), _SIZES)
@pytest.mark.parametrize(("m", "scale_rows"), [(1, 1 << 20), (3, 4), (17, 1 << 20), (17, 4)])
def test_outputs_are_rotated_scaled_and_biased(size: int, q: int, floating: bool, m: int, scale_rows: int) -> None:
    turning, known = _turning(size, q, floating, narrow=False, divide=False)
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(m, size, generator=generator)
    bias = torch.randn(size, generator=generator)
    lengths = 0.5 + torch.rand(m, generator=generator)
    scales = 0.5 + torch.rand(-(-size // scale_rows), generator=generator)
    out = torch.empty(m, size)
    turning(y, out, lengths, None, bias, scales, scale_rows, False)
    stored = y * lengths.unsqueeze(1) * scales[torch.arange(size) // scale_rows]
    wanted = _rotated(stored, _factor(q, floating)) * known["scale"] + bias
    assert _error(out, wanted) < 2.0**-15


@pytest.mark.parametrize("size", [1e-30, 1e-3, 3e4])
def test_rotated_inputs_of_any_size(size: float) -> None:
    layout = _quip(16, 64)
    parts = _parts(layout)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) * size
    x[1] = 0
    found = bind(layout, parts, torch.float32)(x, None)
    assert _error(found, _wanted(x, layout, parts)) < _CLOSE
    assert not found[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantizes_as_the_layout(dtype: torch.dtype) -> None:
    for layout in (_layout(10, 56, (8, 8)), _layout(6, 24, (12,)), replace(_quip(16, 64, (16, 8)), transforms=())):
        parts = _parts(layout)
        assert torch.equal(dequantize(layout, parts, dtype), layout.dequantize(parts, dtype))


@pytest.mark.parametrize(
    ("layout", "word"),
    [
        (_layout(8, 64, (8,), signs=True), "signs"),
        (_layout(8, 64, (8,), grid=Grid.along_k(32)), "scale"),
        (replace(_quip(8, 64)), "powers of two"),
        (_layout(8, 64, (8,), transforms=(Transform("permute", "in"),)), "order"),
        (_layout(8, 64, (8,), transforms=(Transform("scale", "out"),)), "rotation"),
        (_layout(8, 64, (8,), 2), "vectors"),
    ],
)
def test_refuses_with_a_reason(layout: Codebook, word: str) -> None:
    reason = accepts(Problem(layout, "cuda", torch.float16))
    assert reason is not None and word in reason
    assert isinstance(reading(layout), str)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Return the eight nibbles (..., 8) of each word, as the kernel cuts them out: in pairs, at two rotations."""
    words = words.long() & 0xFFFFFFFF
    turned = (words >> 8 | words << 24) & 0xFFFFFFFF
    pairs = [one >> shift for one in (words, turned) for shift in (2, 6)]
    return torch.stack([pair >> half & 15 for pair in pairs for half in (0, 16)], dim=-1)


def _lattice_books(nbits: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    books = torch.randint(0, 3, (len(nbits), 256, 1, 8), generator=generator) + 0.5
    books[..., -1] *= torch.randint(0, 2, (len(nbits), 256, 1), generator=generator) * 2 - 1
    if nbits[-1] == 8:
        books[-1] = torch.randint(-4, 5, (256, 1, 8), generator=generator) / 2
    return books.to(torch.float16)


@pytest.mark.parametrize("nbits", [(16,), (16, 16), (16, 8)], ids=str)
def test_words_stand_for_the_vectors(nbits: tuple[int, ...]) -> None:
    layout = _quip(16, 64, nbits)
    books = _lattice_books(nbits)
    words = words_of(layout, books)
    assert words is not None and words.kind == {(16,): 1, (16, 16): 2, (16, 8): 3}[nbits]
    codes = torch.arange(1 << 16)
    rows = (words.rows, words.second)
    for index, bits in enumerate(nbits):
        table = books[index, :, 0].float()
        if bits == 8:
            found, wanted = _nibbles(rows[index]), PlainBook(table).vectors(torch.arange(256))
        else:
            found = _nibbles(rows[index][codes >> 8] ^ words.signs[codes & 255])
            wanted = FoldedBook(table, 0.25).vectors(codes)
        divisor = 3.45 if index else 1.0
        values = (found - words.zeros[index]) * words.steps[index] * divisor
        torch.testing.assert_close(values.float(), wanted, rtol=0, atol=1e-6)


def test_other_vectors_are_no_words() -> None:
    layout = _quip(16, 64)
    books = _lattice_books((16,))
    assert words_of(layout, books * 1.25) is None
    assert words_of(replace(layout, folded=(0.5,)), books) is None
    assert words_of(_layout(16, 64, (8, 8)), torch.randn(2, 256, 1, 8)) is None


@pytest.mark.parametrize(
    ("n", "k", "words", "books", "pack"),
    [
        (4096, 4096, (8, 2), (8, 1), 1),
        (14336, 4096, (4, 1), (4, 2), 2),
        (8192, 8192, (4, 1), (4, 2), 2),
        (4096, 14336, (8, 2), (8, 1), 2),
        (28672, 8192, (4, 1), (4, 2), 2),
        # Too few blocks for eight warps; too few programs for two blocks at once; an odd number of blocks.
        (4096, 1024, (4, 1), (4, 1), 1),
        (1024, 4096, (8, 2), (8, 1), 1),
        (14336, 4104, (4, 1), (4, 2), 1),
    ],
)
def test_plans(n: int, k: int, words: tuple[int, int], books: tuple[int, int], pack: int) -> None:
    few = pytest.importorskip("qhub_triton.codebook.few").Few
    layout = _layout(n, k, (8, 8))
    parts = {"codes": torch.empty(0), "codebooks": torch.empty(0)}
    lattice: Any = SimpleNamespace(kind=1)
    assert few(layout, parts, lattice, None, {}).plan == words
    plain = few(layout, parts, None, parts["codebooks"], {})
    assert plain.tabulates and plain.plan == books and plain.tables == (512, 16, pack, 1, False)
    assert not few(layout, parts, None, parts["codebooks"], {"tables": False}).tabulates
    assert few(layout, parts, None, parts["codebooks"], {"warps": 2, "tall": 4}).plan == (2, 4)
