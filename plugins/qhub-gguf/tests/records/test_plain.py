"""Blocks in the core's own words, and other layouts as blocks where that is exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from qhub_gguf.records import RECORDS
from qhub_gguf.records.floats import E2M1
from torch import Tensor

from qhub.layouts import Affine, Blocks, Codebook, Grid, Layout, Lookup, Transform
from qhub.layouts.packing import pack

SUPER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


def _bits(weights: Tensor) -> Tensor:
    return weights.contiguous().view(torch.int32)


def _blocks(name: str, layout: Layout) -> Blocks:
    return Blocks(out_features=layout.out_features, in_features=layout.in_features, record=RECORDS[name])


def _taken(name: str, layout: Layout, parts: dict[str, Tensor]) -> bool:
    """Return whether records of ``name`` can hold the matrix; if so they hold the very weights."""
    target = _blocks(name, layout)
    found = target.of_plain(layout, parts)
    if found is None:
        return False
    target.validate(found)
    assert torch.equal(target.decode(found), layout.decode(parts))
    return True


def test_plain_layout_has_the_same_weights(blocks: tuple[Blocks, dict[str, Tensor]]) -> None:
    layout, parts = blocks
    plain, own = layout.plain(parts)
    assert isinstance(plain, Affine | Lookup | Codebook)
    plain.validate(own)
    plain.check_values(own)
    assert torch.equal(_bits(plain.decode(own)), _bits(layout.decode(parts)))


def test_plain_layout_of_a_batch_keeps_what_surrounds(blocks: tuple[Blocks, dict[str, Tensor]]) -> None:
    layout, parts = blocks
    layout = dataclasses.replace(layout, transforms=(Transform("permute", "in"),))
    batch = {
        "blocks": torch.stack([parts["blocks"], parts["blocks"].flip(0), parts["blocks"]]),
        "in_perm": torch.stack([torch.randperm(512, dtype=torch.int32) for _ in range(3)]),
    }
    layout.validate(batch)
    plain, own = layout.plain(batch)
    plain.validate(own)
    assert torch.equal(plain.dequantize(own), layout.dequantize(batch))


def test_plain_layout_becomes_the_same_bytes(name: str, references: dict[str, Tensor]) -> None:
    layout = Blocks(out_features=8, in_features=512, record=RECORDS[name])
    parts = {"blocks": references[f"{name}.written"]}
    back = layout.of_plain(*layout.plain(parts))
    assert back is not None
    if name in ("MXFP4", "NVFP4"):
        # llama.cpp may write -0, which it reads as 0.
        assert torch.equal(layout.decode(back), layout.decode(parts))
    else:
        assert torch.equal(back["blocks"], parts["blocks"])


def _affine(bits: int, group: int, zero: str = "constant", **more: object) -> tuple[Affine, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(bits * 1000 + group)
    q = torch.randint(0, 2**bits, (6, 512), generator=generator)
    layout = Affine(out_features=6, in_features=512, bits=bits, grid=Grid.along_k(group), zero=zero, **more)  # type: ignore[arg-type]
    scales = (torch.rand(6, -(-512 // group), generator=generator) * 0.1 + 0.01).half()
    parts = {"qweight": layout.pack_codes(q), "scales": scales}
    if zero == "value":
        parts["zeros"] = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if zero == "offset":
        parts["zeros"] = -(torch.rand(scales.shape, generator=generator).half())
    return layout, parts


@pytest.mark.parametrize("group", [32, 64, 128, 512, 1024])
@pytest.mark.parametrize("zero", ["constant", "value"])
def test_symmetric_groups_become_q4_0(group: int, zero: str) -> None:
    layout, parts = _affine(4, group, zero, zero_point=8.0 if zero == "constant" else 0.0)
    assert _taken("Q4_0", layout, parts) and _taken("Q5_0", layout, parts) and _taken("Q8_0", layout, parts)


def test_offsets_become_q4_1() -> None:
    layout, parts = _affine(4, 64, "offset")
    assert _taken("Q4_1", layout, parts) and _taken("Q5_1", layout, parts)
    assert not _taken("Q4_0", layout, parts) and not _taken("Q8_0", layout, parts)


def test_what_does_not_fit_is_refused() -> None:
    # Groups of 16 under one scale of 32; a zero that is no middle; scales finer than float16; codes of 8 bits.
    assert not _taken("Q4_0", *_affine(4, 16, zero_point=8.0))
    layout, parts = _affine(4, 32, "value")
    assert not _taken("Q4_0", layout, {**parts, "zeros": parts["zeros"] - 3})
    layout, parts = _affine(4, 32, zero_point=8.0)
    assert not _taken("Q4_0", layout, {**parts, "scales": parts["scales"].float() * 1.0001})
    assert not _taken("Q4_0", *_affine(8, 32, zero_point=128.0))
    assert _taken("Q8_0", *_affine(8, 32, zero_point=128.0))
    for name in SUPER:
        assert not _taken(name, *_affine(2, 256))


def test_scales_per_row_and_blocks_of_rows_become_q8_0() -> None:
    layout, parts = _affine(8, 512, zero_point=128.0)
    assert _taken("Q8_0", layout, parts)
    square = dataclasses.replace(layout, grid=Grid("block", 4, 128))
    assert _taken("Q8_0", square, {**parts, "scales": torch.rand(2, 4).half()})
    flat = dataclasses.replace(layout, grid=Grid("flat", 1, 1024))
    assert _taken("Q8_0", flat, {**parts, "scales": torch.rand(3).half()})


@pytest.mark.parametrize(("name", "group", "dtype"), [("MXFP4", 32, torch.float32), ("NVFP4", 16, torch.float16)])
def test_e2m1_in_halves_or_not(name: str, group: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 16, (4, 512), dtype=torch.uint8)
    layout = Lookup(out_features=4, in_features=512, bits=4, grid=Grid.along_k(group))
    scales = torch.exp2(torch.randint(-6, 3, (4, 512 // group)).float()).to(dtype)
    table = torch.tensor(E2M1) / 2
    parts = {"qweight": pack(codes, 4), "table": table, "scales": scales}
    assert _taken(name, layout, parts)
    # A table in another order, and one that is not E2M1.
    assert _taken(name, layout, {**parts, "table": table.flip(0)})
    assert not _taken(name, layout, {**parts, "table": table + 0.25})
    assert not _taken(name, layout, {**parts, "scales": scales * 1.3})


def test_signs_that_are_odd_are_refused(references: dict[str, Tensor]) -> None:
    layout = Blocks(out_features=8, in_features=512, record=RECORDS["IQ2_XS"])
    plain, own = layout.plain({"blocks": references["IQ2_XS.written"]})
    assert layout.of_plain(plain, own) is not None
    own["signs"] = own["signs"] ^ 1
    assert layout.of_plain(plain, own) is None
    own["signs"] = own["signs"] ^ 2
    assert layout.of_plain(plain, own) is not None


def test_negative_scales_turn_codes_round() -> None:
    # -7 to 8 under a positive scale is -8 to 7 under a negative one.
    layout, parts = _affine(4, 32, zero_point=7.0)
    assert _taken("Q4_0", layout, parts)
