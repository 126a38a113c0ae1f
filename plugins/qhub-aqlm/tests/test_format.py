"""aqlm's checkpoint entries: as aqlm reads them, byte for byte both ways, refused when they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qhub_aqlm.format import AqlmFormat
from qhub_aqlm.plan import layout_of
from torch import Tensor
from transformers import AqlmConfig

from qhub.errors import LayoutError
from qhub.plan import WeightInfo


def test_reading_gives_the_weights_that_aqlm_gives(golden: Any) -> None:
    layout, parts = AqlmFormat().unpack(golden.layout, golden.entries)
    layout.validate(parts)
    layout.check_values(parts)
    # Both add one vector per codebook in float32, in an order of their own, then multiply once.
    books = len(layout.nbits)
    bound = float(golden.entries["codebooks"].abs().max() * golden.entries["scales"].abs().max())
    torch.testing.assert_close(
        layout.dequantize(parts), golden.dequantized, rtol=0, atol=books * books * bound * 2.0**-24
    )


def test_writing_gives_what_was_read(golden: Any) -> None:
    fmt = AqlmFormat()
    layout, parts = fmt.unpack(golden.layout, golden.entries)
    written = fmt.pack(layout, parts, torch.float16)
    assert set(written) == set(golden.entries) == set(fmt.names)
    for name, entry in golden.entries.items():
        assert written[name].dtype == entry.dtype
        assert torch.equal(written[name], entry), name


def test_every_entry_is_declared(golden: Any) -> None:
    declared = AqlmFormat().entries(golden.layout)
    assert set(declared) == set(golden.entries)
    for name, entry in golden.entries.items():
        assert declared[name].required
        assert declared[name].shape == tuple(entry.shape)
        assert entry.dtype in declared[name].dtypes


@given(
    out_group=st.sampled_from([1, 2, 4]),
    in_group=st.sampled_from([1, 3, 8]),
    books=st.integers(1, 4),
    bits=st.integers(1, 9),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_a_block_is_the_scaled_sum_of_its_vectors(
    out_group: int, in_group: int, books: int, bits: int, rows: int, columns: int, seed: int
) -> None:
    """The paper's formula, block by block in float64, from two's complement codes."""
    generator = torch.Generator().manual_seed(seed)
    config = AqlmConfig(in_group, out_group, books, bits)
    layout = layout_of(config, WeightInfo("w.weight", rows * out_group, columns * in_group, torch.float32))
    codes = torch.randint(0, 2**bits, (rows, columns, books), generator=generator)
    entries = {
        "codes": torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(layout.code_dtype),
        "codebooks": torch.randn(books, 2**bits, out_group, in_group, generator=generator),
        "scales": torch.rand(rows, 1, 1, 1, generator=generator),
    }
    found = layout.dequantize(AqlmFormat().unpack(layout, entries)[1])
    for row in range(rows):
        for column in range(columns):
            block = sum(entries["codebooks"][c, int(codes[row, column, c])].double() for c in range(books))
            expected = block * float(entries["scales"][row])
            place = (slice(row * out_group, (row + 1) * out_group), slice(column * in_group, (column + 1) * in_group))
            # Up to 4 float32 additions of values below 6, one product with a factor below 1.
            torch.testing.assert_close(found[place].double(), expected, rtol=0, atol=5 * 24 * 2.0**-24)


HOSTILE: dict[str, tuple[str, Tensor | None, str]] = {
    "no codes": ("codes", None, "'codes' is missing"),
    "no codebooks": ("codebooks", None, "'codebooks' is missing"),
    "no scales": ("scales", None, "'scales' is missing"),
    "code above": ("codes", torch.full((16, 8, 1), 4096, dtype=torch.int16), "'codes' holds 4096"),
    "code below": ("codes", torch.full((16, 8, 1), -2049, dtype=torch.int16), "'codes' holds -2049"),
    "narrow codes": ("codes", torch.zeros(16, 8, 1, dtype=torch.int8), "'codes'"),
    "float codes": ("codes", torch.zeros(16, 8, 1), "'codes'"),
    "few codes": ("codes", torch.zeros(16, 4, 1, dtype=torch.int16), "'codes'"),
    "two codebooks": ("codebooks", torch.zeros(2, 4096, 1, 4, dtype=torch.float16), "'codebooks'"),
    "short codebook": ("codebooks", torch.zeros(1, 2048, 1, 4, dtype=torch.float16), "'codebooks'"),
    "integer codebook": ("codebooks", torch.zeros(1, 4096, 1, 4, dtype=torch.int8), "'codebooks'"),
    "flat scales": ("scales", torch.ones(16, dtype=torch.float16), "'scales'"),
    "infinite scale": ("scales", torch.full((16, 1, 1, 1), float("inf")), "'scales' holds"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_entries_that_cannot_be_are_refused(twelve_bits: Any, name: str) -> None:
    entry, value, message = HOSTILE[name]
    entries = twelve_bits.copy()
    if value is None:
        del entries[entry]
    else:
        entries[entry] = value
    with pytest.raises(LayoutError, match=message):
        AqlmFormat().unpack(twelve_bits.layout, entries)


def test_what_is_written_is_what_the_installed_aqlm_dequantizes(golden_cases: dict[str, Any]) -> None:
    """Runs where aqlm is installed."""
    utils = pytest.importorskip("aqlm.utils")
    for name, golden in golden_cases.items():
        fmt = AqlmFormat()
        layout, parts = fmt.unpack(golden.layout, golden.entries)
        written = fmt.pack(layout, parts, torch.float16)
        codes = utils.unpack_int_data(written["codes"], golden.config.nbits_per_codebook)
        dense = utils._dequantize_weight(codes, written["codebooks"].float(), written["scales"].float())
        assert torch.equal(dense, golden.dequantized), name
