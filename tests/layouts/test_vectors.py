"""Folded codebooks: which vectors they stand for, that the nearest is found, and how their codes are stored."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Codebook, Grid
from qhub.layouts.vectors import FoldedBook, PlainBook

from . import oracle


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _listed(table: Tensor, shift: float) -> Tensor:
    """Return every vector by its code, one sign at a time."""
    rows, width = table.shape
    vectors = []
    for row, code in itertools.product(range(rows), range(1 << width)):
        odd = bin(code).count("1") % 2
        signs = code ^ odd
        added = -shift if odd else shift
        vectors.append([(-1) ** (signs >> j & 1) * float(table[row, j]) + added for j in range(width)])
    return torch.tensor(vectors)


@pytest.mark.parametrize(("rows", "width", "shift"), [(3, 2, 0.25), (5, 4, 0.1), (4, 5, 0.0)])
def test_codes_stand_for_signed_and_shifted_rows(rows: int, width: int, shift: float) -> None:
    table = _random(rows, width)
    book = FoldedBook(table, shift)
    everything = torch.arange(rows << width)
    expected = _listed(table, shift)
    # Few codes and many are looked up in two ways.
    torch.testing.assert_close(book.vectors(everything), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(book.vectors(everything[1:3]), expected[1:3], rtol=1e-6, atol=1e-7)
    assert book.vectors(everything[:4].reshape(2, 2)).shape == (2, 2, width)


@pytest.mark.parametrize(("rows", "width", "shift"), [(3, 2, 0.25), (6, 4, 0.25), (16, 5, 0.4), (1, 3, 0.5)])
def test_the_nearest_vector_is_found(rows: int, width: int, shift: float) -> None:
    """Rows of either sign: a negative entry changes which signs are allowed."""
    table, points = _random(rows, width, seed=1), 1.5 * _random(500, width, seed=2)
    book, everything = FoldedBook(table, shift), _listed(table, shift)
    nearest = torch.cdist(points.double(), everything.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
    found = (points - book.vectors(book.nearest(points))).double().norm(dim=-1)
    torch.testing.assert_close(found, nearest, rtol=1e-4, atol=1e-5)


def test_e8p_folded_is_e8p_listed() -> None:
    """The same lattice as the table of all 65,536 vectors, in which the sign bits have another order."""
    listed = torch.from_numpy(oracle.e8p_codebook()).float()
    rows = listed[::256][:, :] - 0.25
    folded = FoldedBook(rows, 0.25).vectors(torch.arange(1 << 16))
    assert {tuple(v) for v in folded.tolist()} == {tuple(v) for v in listed.tolist()}


def test_a_plain_book_lists_its_vectors() -> None:
    table, points = _random(7, 3), _random(50, 3, seed=1)
    book = PlainBook(table)
    assert torch.equal(book.vectors(torch.tensor([[2, 5]])), table[[2, 5]].unsqueeze(0))
    assert torch.equal(book.nearest(points), torch.cdist(points, table).argmin(-1))


def _layout(**changes: object) -> Codebook:
    settings: dict[str, object] = dict(
        nbits=(12, 6), folded=(0.25, None), divisors=(1.0, 3.0), out_group=1, in_group=4, grid=Grid("block", 8, 16)
    )
    return Codebook(out_features=8, in_features=16, shared=True, **{**settings, **changes})  # type: ignore[arg-type]


def _parts(layout: Codebook) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.stack([torch.randint(0, 1 << bits, (8, 4), generator=generator) for bits in layout.nbits], -1)
    books = _random(*layout.part_specs()["codebooks"].shape, seed=4)
    return {"codes": layout.stored_codes(codes), "codebooks": books, "scales": torch.full((1, 1), 0.5)}


def test_a_layout_of_folded_and_divided_codebooks_is_their_sum() -> None:
    """Codes of 12 and of 6 bits take two bytes and one; 12 bits are 256 rows of 4 signs, 6 bits 64 of the rows."""
    layout = _layout()
    parts = _parts(layout)
    layout.validate(parts)
    layout.check_values(parts)
    assert parts["codes"].dtype == torch.int8 and parts["codes"].shape == (8, 4, 3)
    assert parts["codebooks"].shape == (2, 256, 1, 4)
    first = _listed(parts["codebooks"][0, :, 0], 0.25)
    found = layout.decode(parts).reshape(8, 4, 4)
    raw = parts["codes"].numpy().view("uint8").astype(int)
    for n, k in itertools.product(range(8), range(4)):
        low, high, second = raw[n, k]
        expected = 0.5 * (first[low + 256 * high] + parts["codebooks"][1, second, 0] / 3)
        torch.testing.assert_close(found[n, k], expected, rtol=1e-6, atol=1e-6)


def test_codes_of_two_sizes_survive_storing() -> None:
    layout = _layout()
    codes = torch.tensor([[[4095, 63], [0, 0], [256, 1], [255, 32]]]).expand(8, 4, 2)
    assert torch.equal(layout.indices({**_parts(layout), "codes": layout.stored_codes(codes)}), codes)


def test_what_a_layout_stands_for_is_found_again() -> None:
    layout = _layout()
    parts = _parts(layout)
    weight = layout.decode(parts)
    found = layout.encode(weight, parts, "keep")
    torch.testing.assert_close(layout.decode(found), weight, rtol=0, atol=1e-5)


def test_a_grown_weight_gets_a_grown_scale() -> None:
    layout = _layout()
    parts = _parts(layout)
    weight = layout.decode(parts)
    fitted = layout.encode(4 * weight, parts, "refit")
    torch.testing.assert_close(fitted["scales"], 4 * parts["scales"], rtol=1e-3, atol=0)


def test_codes_outside_are_refused() -> None:
    layout = _layout()
    parts = _parts(layout)
    for place, byte in ((1, 16), (2, 64)):
        codes = parts["codes"].clone()
        codes[0, 0, place] = byte
        with pytest.raises(LayoutError, match=r"'codes' holds a code outside codebooks of \(12, 6\) bits"):
            layout.check_values({**parts, "codes": codes})


@pytest.mark.parametrize(
    "changes",
    [
        {"folded": (0.25,)},
        {"divisors": (1.0, 2.0, 3.0)},
        {"divisors": (1.0, 0.0)},
        {"divisors": (1.0, float("nan"))},
        {"nbits": (3, 6)},
        {"out_group": 2},
    ],
)
def test_impossible_descriptions_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        _layout(**changes)
