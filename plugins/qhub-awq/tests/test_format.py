"""AWQ's checkpoint entries: as autoawq and gptqmodel read them, byte for byte both ways, refused when wrong."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qhub_awq.format import IN_SCALE, format_of, zeros_width
from qhub_awq.plan import layout_of
from torch import Tensor

from qhub.errors import LayoutError

FORMATS = ("gemm", "gemv", "gemv_fast", "llm-awq")


def test_reading_gives_the_weights_that_were_packed(known: Any) -> None:
    layout, parts = known.format.unpack(known.layout, known.entries)
    layout.validate(parts)
    layout.check_values(parts)
    weights = layout.dequantize(parts)
    if known.config.format == "gemv":
        assert torch.equal(weights, known.dequantized)
    elif known.config.format == "gemm":
        # gptqmodel computes the product in float16; ours is exact, so rounding it once gives theirs.
        assert torch.equal(weights.half().float(), known.dequantized)
    else:
        # The file holds scale * zero rounded to float16: half a unit in its last place.
        bound = parts["zeros"].abs().float() * 2.0**-11 + 2.0**-25
        off = (weights - known.dequantized).abs()
        assert bool((off <= bound.repeat_interleave(layout.grid.cols, 1) * (1 + 2.0**-10) + 1e-7).all())


def test_writing_gives_what_was_read(known: Any) -> None:
    layout, parts = known.format.unpack(known.layout, known.entries)
    written = known.format.pack(layout, parts, torch.float16)
    assert set(written) == set(known.entries) == set(known.format.names) - {"in_scale"}
    for name, entry in known.entries.items():
        assert written[name].dtype == entry.dtype
        assert torch.equal(written[name], entry), name


def test_every_entry_is_declared(known: Any) -> None:
    declared = dict(known.format.entries(known.layout))
    assert not declared.pop("in_scale").required
    assert set(declared) == set(known.entries)
    for name, entry in known.entries.items():
        assert declared[name].shape == tuple(entry.shape)
        assert entry.dtype in declared[name].dtypes
        assert declared[name].required


def test_zeros_take_whole_words() -> None:
    """calculate_zeros_width of llm-awq, by hand: groups of 128 in words of 8, of 64 in pairs, of 32 in fours."""
    assert [zeros_width(k, 128) for k in (128, 1024, 1152, 4096)] == [1, 1, 2, 4]
    assert [zeros_width(k, 64) for k in (64, 512, 1024, 1088)] == [2, 2, 2, 4]
    assert [zeros_width(k, 32) for k in (32, 1024, 1056)] == [4, 4, 8]
    assert zeros_width(512, 512) == 1


@st.composite
def layers(draw: st.DrawFn) -> Any:
    """Draw config, codes (N, K), zeros (N, G), scales (N, G) and an input scale (K,) or None."""
    format_ = draw(st.sampled_from(FORMATS))
    group = draw(st.sampled_from([-1, 32, 64, 128] if format_ != "gemm" else [-1, 1, 8, 24, 32, 128]))
    zero_point = draw(st.booleans())
    n = 8 * draw(st.integers(1, 5))
    unit = {"gemm": 1, "gemv": 8}.get(format_, 64)
    k = draw(st.integers(1, 3)) * (unit if group == -1 else max(unit, group))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    groups = 1 if group == -1 else k // group
    codes = torch.randint(0, 16, (n, k), generator=generator)
    zeros = torch.randint(0, 16, (n, groups), generator=generator)
    if not zero_point:
        zeros.fill_(8)
    scales = torch.rand(n, groups, generator=generator).half()
    in_scale = torch.rand(k, generator=generator) + 0.1 if draw(st.booleans()) else None
    config = SimpleNamespace(format=format_, group_size=group, zero_point=zero_point)
    return config, codes, zeros, scales, in_scale


@given(layers())
def test_any_layer_is_written_and_read_back_by_the_formula(drawn: Any) -> None:
    """W[n, k] = scale * (q - zero) * in_scale[k] in float64, up to the rounding that the format itself makes."""
    config, codes, zeros, scales, in_scale = drawn
    n, k = codes.shape
    fmt, layout = format_of(config), layout_of(config, n, k)
    parts: dict[str, Tensor] = {"qweight": layout.pack_codes(codes), "scales": scales}
    if layout.zero == "value":
        parts["zeros"] = zeros.to(torch.uint8)
    elif layout.zero == "offset":
        parts["zeros"] = -(scales.float() * zeros).half()
    if in_scale is not None:
        layout = dataclasses.replace(layout, transforms=IN_SCALE)
        parts["in_scale"] = in_scale
    layout.validate(parts)
    entries = fmt.pack(layout, parts, torch.float16)
    declared = fmt.entries(layout)
    assert {name: declared[name].shape for name in entries} == {name: tuple(t.shape) for name, t in entries.items()}
    planned = layout_of(config, n, k)
    again, same = fmt.unpack(planned, entries)
    assert again == layout
    assert set(same) == set(parts)
    assert [name for name, part in parts.items() if not torch.equal(same[name], part)] == []
    rewritten = fmt.pack(again, same, torch.float16)
    assert [name for name, entry in entries.items() if not torch.equal(rewritten[name], entry)] == []
    spread = k // scales.shape[1]
    exact = scales.double().repeat_interleave(spread, 1) * (codes - zeros.repeat_interleave(spread, 1)).double()
    if layout.zero == "offset":
        offset = parts["zeros"].double().repeat_interleave(spread, 1)
        exact = scales.double().repeat_interleave(spread, 1) * codes.double() + offset
    if in_scale is not None:
        exact = exact * in_scale.double()
    # Two roundings to float32 of numbers up to 16.
    torch.testing.assert_close(again.dequantize(same).double(), exact, rtol=2.0**-22, atol=16 * 2.0**-23)


def test_the_file_decides_about_zeros(known: Any) -> None:
    """A config that says zero_point=false beside other zeros: the zeros are read, as upstream's kernels do."""
    if known.config.format != "gemv":
        pytest.skip("only this checkpoint has zeros other than 8")
    planned = dataclasses.replace(known.layout, zero="constant", zero_point=8.0)
    layout, parts = known.format.unpack(planned, known.entries)
    assert layout == known.layout
    assert torch.equal(layout.dequantize(parts), known.dequantized)


def test_fractional_zeros_are_not_written_as_whole_ones(gemm: Any) -> None:
    layout, parts = gemm.format.unpack(gemm.layout, gemm.entries)
    layout = dataclasses.replace(layout, zero="value", zero_point=0.0)
    for value in (7.5, 16.0, -1.0):
        with pytest.raises(LayoutError, match="zeros"):
            gemm.format.pack(layout, {**parts, "zeros": torch.full_like(parts["scales"], value)}, torch.float16)
    whole = gemm.format.pack(layout, {**parts, "zeros": torch.full_like(parts["scales"], 8.0)}, torch.float16)
    assert torch.equal(whole["qzeros"], gemm.entries["qzeros"])


HOSTILE: dict[str, tuple[str, Tensor | None, str]] = {
    "no codes": ("qweight", None, "'qweight'"),
    "no zeros": ("qzeros", None, "'qzeros'"),
    "no scales": ("scales", None, "'scales'"),
    "transposed codes": ("qweight", torch.zeros(16, 256, dtype=torch.int32), "'qweight' is int32 .16, 256., expected"),
    "wide codes": ("qweight", torch.zeros(256, 16, dtype=torch.int64), "'qweight' is int64"),
    "other groups": ("qzeros", torch.zeros(2, 16, dtype=torch.int32), "'qzeros'"),
    "float zeros": ("qzeros", torch.zeros(8, 16), "'qzeros'"),
    "few scales": ("scales", torch.ones(4, 128, dtype=torch.float16), "'scales'"),
    "whole scales": ("scales", torch.ones(8, 128, dtype=torch.int32), "'scales'"),
    "short input scale": ("in_scale", torch.ones(255), "'in_scale'"),
    "whole input scale": ("in_scale", torch.ones(256, dtype=torch.int32), "'in_scale'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_entries_that_cannot_be_are_refused(gemm: Any, name: str) -> None:
    entry, value, message = HOSTILE[name]
    entries = gemm.copy()
    if value is None:
        del entries[entry]
    else:
        entries[entry] = value
    with pytest.raises(LayoutError, match=message):
        gemm.format.unpack(gemm.layout, entries)


def test_an_infinite_scale_is_refused(gemm: Any) -> None:
    entries = gemm.copy()
    entries["scales"][3, 5] = float("inf")
    layout, parts = gemm.format.unpack(gemm.layout, entries)
    with pytest.raises(LayoutError, match="scales"):
        layout.check_values(parts)
