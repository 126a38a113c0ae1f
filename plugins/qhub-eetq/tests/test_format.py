"""EETQ's checkpoint entries: read as EETQ means them, written byte for byte, refused when they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qhub_eetq.format import EetqFormat
from qhub_eetq.interleave import deinterleave, interleave
from qhub_eetq.plan import int8_rows
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Affine, Grid


def test_every_layer_is_written_as_it_was_read(stored: dict[str, Tensor]) -> None:
    layers = [key.removesuffix("_scales") for key in stored if key.endswith("_scales")]
    assert len(layers) == 14
    for key in layers:
        k, n = stored[key].shape
        layout, parts = EetqFormat().unpack(
            int8_rows(n, k), {"weight": stored[key], "weight_scales": stored[f"{key}_scales"]}
        )
        layout.validate(parts)
        written = EetqFormat().pack(layout, parts, torch.float16)
        assert torch.equal(written["weight"], stored[key])
        assert torch.equal(written["weight_scales"], stored[f"{key}_scales"])


def test_weights_are_those_of_upstreams_unprocessed_codes(
    stored: dict[str, Tensor], reference: dict[str, Tensor]
) -> None:
    (name,) = (key.removeprefix("dequant.") for key in reference if key.startswith("dequant."))
    expected = reference[f"dequant.{name}"]
    entries = {"weight": stored[name], "weight_scales": stored[f"{name}_scales"]}
    layout, parts = EetqFormat().unpack(int8_rows(*expected.shape), entries)
    assert torch.equal(layout.dequantize(parts), expected)


def _upstream(codes: Tensor) -> Tensor:
    """Return the file's bytes, element by element, as the four steps of upstream's preprocessor say."""
    n, k = codes.shape
    columns = torch.empty(n, k, dtype=torch.int64)
    for row in range(k):
        # permute_B_rows_for_mixed_gemm: which row of a tile of 16 is read for a place in it.
        place = row % 16
        read = 8 * ((place % 4) // 2) + place % 2 + 2 * (place // 4)
        columns[:, row] = codes[:, row - place + read].long()
    flat = torch.empty(n * k, dtype=torch.int64)
    for column in range(n):
        # interleave_column_major_tensor, value by value: it moves four at a time.
        for row in range(k):
            base = row - row % 64
            write_row = 2 * base + 64 * (column % 2) + row % 64
            flat[(column // 2) * 2 * k + write_row] = columns[column, row]
    biased = ((flat + 128) % 256).to(torch.uint8)
    for base in range(0, n * k, 4):
        biased[base + 1], biased[base + 2] = biased[base + 2].clone(), biased[base + 1].clone()
    return biased.view(torch.int8).reshape(k, n)


@pytest.mark.parametrize(("n", "k"), [(64, 64), (64, 192), (128, 64)])
def test_the_interleaving_is_upstreams(n: int, k: int) -> None:
    codes = torch.randint(-128, 128, (n, k), generator=torch.Generator().manual_seed(n + k)).to(torch.int8)
    assert torch.equal(interleave(codes), _upstream(codes))


@given(n=st.integers(1, 6), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_interleaving_is_undone(n: int, k: int, seed: int) -> None:
    codes = torch.randint(-128, 128, (2 * n, 64 * k), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    stored = interleave(codes)
    assert stored.shape == (64 * k, 2 * n)
    assert torch.equal(deinterleave(stored), codes)


def _entries(n: int = 64, k: int = 128) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    return {"weight": interleave(codes), "weight_scales": torch.rand(n, generator=generator).half() + 0.5}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_read_in_any_dtype_and_written_in_float16(dtype: torch.dtype) -> None:
    entries = _entries()
    # Multiples of 1/128 between 1/2 and 1 are exact in all three.
    scales = torch.arange(64, 128) / 128
    layout, parts = EetqFormat().unpack(int8_rows(64, 128), {**entries, "weight_scales": scales.to(dtype)})
    layout.validate(parts)
    written = EetqFormat().pack(layout, parts, torch.float16)["weight_scales"]
    assert written.dtype == torch.float16 and torch.equal(written.float(), scales)


def test_scales_that_float16_rounds_are_not_written() -> None:
    """EETQ's kernels would read other bytes as float16."""
    layout, parts = EetqFormat().unpack(int8_rows(64, 128), {**_entries(), "weight_scales": torch.full((64,), 0.1)})
    with pytest.raises(LayoutError, match="float16"):
        EetqFormat().pack(layout, parts, torch.float16)


def _with(values: dict[int, float]) -> Tensor:
    scales = _entries()["weight_scales"].clone()
    for row, value in values.items():
        scales[row] = value
    return scales


HOSTILE: dict[str, tuple[str, Tensor | None, str]] = {
    "no weight": ("weight", None, "'weight' is missing"),
    "no scales": ("weight_scales", None, "'weight_scales' is missing"),
    "transposed": ("weight", torch.zeros(64, 128, dtype=torch.int8), "'weight'"),
    "half": ("weight", torch.zeros(64, 64, dtype=torch.int8), "'weight'"),
    "unsigned": ("weight", torch.zeros(128, 64, dtype=torch.uint8), "'weight'"),
    "float weight": ("weight", torch.zeros(128, 64, dtype=torch.float16), "'weight'"),
    "column of scales": ("weight_scales", torch.ones(64, 1).half(), "'weight_scales'"),
    "scales of inputs": ("weight_scales", torch.ones(128).half(), "'weight_scales'"),
    "double scales": ("weight_scales", torch.ones(64).double(), "'weight_scales'"),
    "nan": ("weight_scales", _with({3: float("nan")}), "NaN"),
    "infinity": ("weight_scales", _with({3: float("inf")}), "infinity"),
    "negative": ("weight_scales", _with({3: -0.5}), "-0.5 for output channel 3"),
    "zero": ("weight_scales", _with({5: 0.0}), "0 for output channel 5"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_entries_that_cannot_be_are_refused(name: str) -> None:
    entry, value, message = HOSTILE[name]
    entries = _entries()
    if value is None:
        del entries[entry]
    else:
        entries[entry] = value
    with pytest.raises(LayoutError, match=message):
        EetqFormat().unpack(int8_rows(64, 128), entries)


@pytest.mark.parametrize("code", [127, 0])
def test_a_row_of_zeros_is_read_from_either_writer(code: int) -> None:
    entries = _entries()
    codes = deinterleave(entries["weight"])
    codes[7] = code
    entries = {"weight": interleave(codes), "weight_scales": _with({7: 0.0})}
    layout, parts = EetqFormat().unpack(int8_rows(64, 128), entries)
    assert not layout.dequantize(parts)[7].any()


OTHERS: dict[str, Any] = {
    "groups": dict(bits=8, signed=True, grid=Grid.along_k(64)),
    "4 bits": dict(bits=4, zero_point=8.0, grid=Grid("block", 1, 128)),
    "units": dict(bits=8, signed=True, grid=Grid("block", 1, 128), unit=1 / 127),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_are_not_written(name: str) -> None:
    layout = Affine(out_features=64, in_features=128, **OTHERS[name])
    parts = {key: torch.zeros(spec.shape, dtype=spec.dtypes[0]) for key, spec in layout.part_specs().items()}
    with pytest.raises(LayoutError, match="scale per row"):
        EetqFormat().pack(layout, parts, torch.float16)


def test_other_shapes_are_not_written() -> None:
    layout = int8_rows(32, 128)
    parts = {key: torch.zeros(spec.shape, dtype=spec.dtypes[0]) for key, spec in layout.part_specs().items()}
    with pytest.raises(LayoutError, match="64x64"):
        EetqFormat().pack(layout, parts, torch.float16)
