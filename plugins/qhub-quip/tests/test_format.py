"""QuIP#'s checkpoint entries: as QuIP# reads them, byte for byte both ways, refused when they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qhub_quip.format import QuipFormat
from torch import Tensor

from qhub.errors import LayoutError


def test_reading_gives_the_weights_that_quip_gives(golden: Any) -> None:
    layout, parts = QuipFormat(golden.config).unpack(golden.layout, golden.entries)
    layout.validate(parts)
    layout.check_values(parts)
    # A row of the rotated matrix has the norm of a row before it; every stage of a rotation rounds once (at most 10 + 4
    # of them, with the factors' sums), scales and the codebooks' sum 6 times.
    norm = float(golden.rounded.norm()) * float(golden.entries["SV"].abs().max() * golden.entries["Wscale"])
    if "scaleWH" in golden.entries:
        norm /= float(golden.entries["scaleWH"].min())
    found = layout.dequantize(parts)
    torch.testing.assert_close(found, golden.dequantized, rtol=0, atol=20 * 2.0**-24 * 1.1 * norm)
    assert float((found - golden.dequantized).norm() / golden.dequantized.norm()) < 1e-6


def test_the_stored_matrix_is_what_quip_rounded_to(golden: Any) -> None:
    layout, parts = QuipFormat(golden.config).unpack(golden.layout, golden.entries)
    found = layout.decode({**parts, "scales": torch.ones(1, 1)})
    # QuIP# takes the residual's quotient from a reciprocal, or not.
    torch.testing.assert_close(found, golden.rounded, rtol=0, atol=2.0**-21)


def test_writing_gives_what_was_read(golden: Any) -> None:
    fmt = QuipFormat(golden.config)
    layout, parts = fmt.unpack(golden.layout, golden.entries)
    written = fmt.pack(layout, parts, torch.float16)
    assert set(written) == set(golden.entries)
    for name, entry in golden.entries.items():
        assert written[name].dtype == entry.dtype, name
        assert torch.equal(written[name], entry), name


def test_every_entry_is_declared(golden: Any) -> None:
    declared = QuipFormat(golden.config).entries(golden.layout)
    assert set(declared) == set(golden.entries)
    for name, entry in golden.entries.items():
        assert declared[name].required and declared[name].shape == tuple(entry.shape)
        assert entry.dtype in declared[name].dtypes


@pytest.mark.parametrize(("name", "bits"), [("2 bits", 2), ("3 bits", 3), ("4 bits", 4)])
def test_codes_take_their_bits_and_layers_share_the_tables(name: str, bits: int, known: dict[str, Any]) -> None:
    case = known[name]
    first, second = (QuipFormat(case.config).unpack(case.layout, case.copy())[1] for _ in range(2))
    assert 8 * first["codes"].numel() * first["codes"].element_size() == bits * case.dequantized.numel()
    assert first["codebooks"].data_ptr() == second["codebooks"].data_ptr()
    assert first["codebooks"].numel() <= 2 * 256 * 8


def test_layers_share_hadamard_matrices(known: dict[str, Any]) -> None:
    case = known["2 bits, 12"]
    first, second = (QuipFormat(case.config).unpack(case.layout, case.copy())[1] for _ in range(2))
    assert first["in_hadamard"].dtype == torch.int8
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in ("in_hadamard", "out_hadamard"))


def _vector(size: int, **values: float) -> Tensor:
    vector = torch.ones(size, dtype=torch.float16)
    vector[3] = next(iter(values.values()))
    return vector


HOSTILE: dict[str, tuple[str, Tensor | None, str]] = {
    "no codes": ("Qidxs", None, "'Qidxs' is missing"),
    "no SU": ("SU", None, "'SU' is missing"),
    "no Wscale": ("Wscale", None, "'Wscale' is missing"),
    "no id": ("codebook_id", None, "'codebook_id' is missing"),
    "no scaleWH": ("scaleWH", None, "'scaleWH' is missing"),
    "short codes": ("Qidxs", torch.zeros(48, 4, dtype=torch.int64), "'Qidxs'"),
    "codes of 4 bits": ("Qidxs", torch.zeros(48, 12, dtype=torch.int64), "'Qidxs'"),
    "narrow codes": ("Qidxs", torch.zeros(48, 6, dtype=torch.int32), "'Qidxs'"),
    "other codebook": ("codebook_id", torch.tensor(17), r"'codebook_id' is 17 \(E8P12RVQ4B\)"),
    "no codebook": ("codebook_id", torch.tensor(2**40), "which QuIP# does not have"),
    "long SU": ("SU", torch.ones(48).half(), "'SU'"),
    "integer SV": ("SV", torch.ones(48, dtype=torch.int8), "'SV'"),
    "nan SU": ("SU", _vector(192, value=float("nan")), "'SU' holds NaN"),
    "infinite SV": ("SV", _vector(48, value=float("inf")), "'SV' holds NaN or infinity"),
    "zero SV": ("SV", _vector(48, value=0.0), "'SV' holds 0"),
    "zero scaleWH": ("scaleWH", _vector(192, value=0.0), "'scaleWH' holds 0"),
    "negative scaleWH": ("scaleWH", _vector(192, value=-2.0), "'scaleWH' holds -2"),
    "zero Wscale": ("Wscale", torch.tensor(0.0), "'Wscale' holds 0"),
    "infinite Wscale": ("Wscale", torch.tensor(float("inf")), "'Wscale' holds NaN or infinity"),
    "vector Wscale": ("Wscale", torch.ones(48), "'Wscale'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_entries_that_cannot_be_are_refused(known: dict[str, Any], name: str) -> None:
    entry, value, message = HOSTILE[name]
    case = known["2 bits, 12"]
    entries = case.copy()
    if value is None:
        del entries[entry]
    else:
        entries[entry] = value
    with pytest.raises(LayoutError, match=message):
        QuipFormat(case.config).unpack(case.layout, entries)


def test_a_vector_that_the_config_does_not_announce_is_refused(known: dict[str, Any]) -> None:
    case = known["2 bits"]
    with pytest.raises(LayoutError, match="'scaleWH' does not go with rescale_WH=False"):
        QuipFormat(case.config).unpack(case.layout, {**case.entries, "scaleWH": torch.ones(128).half()})


def test_other_layouts_are_not_written(known: dict[str, Any]) -> None:
    two, four = known["2 bits"], known["4 bits"]
    layout, parts = QuipFormat(two.config).unpack(two.layout, two.entries)
    with pytest.raises(LayoutError, match="codes of E8P12RVQ4B"):
        QuipFormat(four.config).pack(layout, parts, torch.float16)
