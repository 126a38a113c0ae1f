"""A matrix of records of each type does all that the core asks of a layout."""

from __future__ import annotations

import pytest
import torch
from qhub_gguf.records import RECORDS
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Blocks
from qhub.layouts.keys import layout_key
from qhub.merging.feedback import spread_errors

Matrix = tuple[Blocks, dict[str, Tensor]]


@pytest.fixture
def written(name: str, references: dict[str, Tensor]) -> Matrix:
    """An 8x512 layout with what llama.cpp wrote, and its parts."""
    return Blocks(out_features=8, in_features=512, record=RECORDS[name]), {"blocks": references[f"{name}.written"]}


def test_parts_are_what_a_file_holds(written: Matrix) -> None:
    layout, parts = written
    layout.validate(parts)
    layout.check_values(parts)
    with pytest.raises(LayoutError, match="blocks"):
        layout.validate({"blocks": parts["blocks"][:, :-1]})


def test_runs_that_do_not_fill_a_row_are_refused(name: str) -> None:
    with pytest.raises(LayoutError, match=name):
        Blocks(out_features=4, in_features=512 + 16, record=RECORDS[name])


def test_writing_what_is_there_changes_nothing(written: Matrix) -> None:
    layout, parts = written
    decoded = layout.dequantize(parts)
    for policy in ("keep", "best"):
        again = layout.dequantize(layout.requantize(decoded, parts, policy))  # type: ignore[arg-type]
        assert float((again - decoded).norm()) <= 2.0**-20 * float(decoded.norm())


def test_refitting_helps_other_weights(written: Matrix, references: dict[str, Tensor]) -> None:
    layout, parts = written
    weights = references["weights"].float() * 1.7 + 0.02
    errors = {
        policy: float((layout.dequantize(layout.requantize(weights, parts, policy)) - weights).norm())  # type: ignore[arg-type]
        for policy in ("keep", "refit", "best")
    }
    assert errors["refit"] < errors["keep"] and errors["best"] <= errors["refit"] * (1 + 1e-6)


def test_rows_are_independent(written: Matrix) -> None:
    layout, parts = written
    dense = layout.dequantize(parts)
    cut = layout.select_rows(parts, 3, 6)
    assert cut is not None and torch.equal(cut[0].dequantize(cut[1]), dense[3:6])
    index = torch.tensor([7, 0, 0, 4])
    taken = layout.take_rows(parts, index)
    assert taken is not None and torch.equal(taken[0].dequantize(taken[1]), dense[index])
    stacked = layout.concat_rows([cut[1], parts], [cut[0], layout])
    assert stacked is not None and torch.equal(stacked[0].dequantize(stacked[1]), torch.cat([dense[3:6], dense]))


def test_batch_is_decoded_and_written_matrix_by_matrix(written: Matrix, references: dict[str, Tensor]) -> None:
    layout, parts = written
    batch = {"blocks": torch.stack([parts["blocks"], parts["blocks"].flip(0)])}
    layout.validate(batch)
    dense = layout.dequantize(parts)
    assert torch.equal(layout.dequantize(batch), torch.stack([dense, dense.flip(0)]))
    weights = references["weights"].float()
    both = layout.encode(torch.stack([weights, 2 * weights]), batch, "refit")
    for index, factor in enumerate((1, 2)):
        alone = layout.encode(factor * weights, parts, "refit")
        errors = [
            float((layout.decode(p) - factor * weights).norm()) for p in (alone, {"blocks": both["blocks"][index]})
        ]
        # Sums of other lengths are rounded otherwise, which may turn a scale by its last bit.
        assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_columns_are_rounded_under_the_scales_there(written: Matrix, references: dict[str, Tensor]) -> None:
    layout, parts = written
    columns = layout.columns(parts)
    assert columns is not None and 512 % columns.width == 0
    weights = references["weights"].float() * 1.05
    nearest = layout.decode(layout.nearest(weights, parts))
    found = torch.empty_like(weights)
    for column in range(0, 512, columns.width):
        window = slice(column, column + columns.width)
        values = weights[:, column] if columns.width == 1 else weights[:, window].t()
        rounded = columns.nearest(column, values)
        found[:, window] = rounded[:, None] if columns.width == 1 else rounded.t()
    assert float((found - weights).norm()) <= float((nearest - weights).norm()) * (1 + 1e-5)
    # What columns stand for is on the grid: it can be written down.
    rewritten = layout.decode(layout.parts_of_columns(columns, found, parts))
    assert float((rewritten - found).norm()) <= 2.0**-20 * float(found.norm())


def test_errors_are_spread_over_columns(written: Matrix, references: dict[str, Tensor]) -> None:
    layout, parts = written
    target = references["weights"].float() * 1.05
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 24, generator=generator) @ torch.randn(24, 512, generator=generator)
    columns = layout.columns(parts)
    assert columns is not None
    spread = layout.parts_of_columns(columns, spread_errors(target, inputs, columns), parts)
    apart = layout.nearest(target, parts)
    errors = [float(((layout.decode(p) - target) @ inputs.t()).norm()) for p in ({**parts, **spread}, apart)]
    assert errors[0] < 0.7 * errors[1]


def test_scales_that_are_no_numbers_are_refused(written: Matrix) -> None:
    layout, parts = written
    name, blocks = layout.record.name, parts["blocks"].clone()
    last = blocks[-1].unflatten(0, (-1, layout.record.size))[-1]
    if name in ("MXFP4", "NVFP4"):
        last[0] = 255
    elif name == "IQ1_M":
        last[49:56:2] = torch.tensor([0x00, 0xE0, 0xC0, 0x7F], dtype=torch.uint8) | last[49:56:2] & 15
    else:
        at = layout.record.halves[-1]  # type: ignore[attr-defined]
        last[at : at + 2] = torch.tensor([0, 0xFC], dtype=torch.uint8)
    with pytest.raises(LayoutError, match=rf"blocks.*{name}"):
        layout.check_values({"blocks": blocks})
    # On the meta device there is nothing to look at.
    layout.check_values({"blocks": blocks.to("meta")})


def test_scales_of_zero_are_legal(name: str) -> None:
    record = RECORDS[name]
    layout = Blocks(out_features=2, in_features=512, record=record)
    parts = {"blocks": torch.zeros(2, layout.row_bytes, dtype=torch.uint8)}
    layout.check_values(parts)
    if name != "MXFP4":
        assert not bool(layout.decode(parts).any())
    assert bool(torch.isfinite(layout.decode(layout.nearest(torch.ones(2, 512), parts))).all())


def test_key_tells_types_apart() -> None:
    keys = {layout_key(Blocks(out_features=8, in_features=512, record=record)) for record in RECORDS.values()}
    assert len(keys) == len(RECORDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once(written: Matrix, dtype: torch.dtype) -> None:
    layout, parts = written
    assert torch.equal(layout.dequantize(parts, dtype), layout.dequantize(parts).to(dtype))


def test_large_matrix_is_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    record = RECORDS["Q4_K"]
    layout = Blocks(out_features=40, in_features=512, record=record)
    weights = torch.randn(40, 512, generator=torch.Generator().manual_seed(1))
    parts = layout.fitted(weights)
    whole = layout.decode(parts)
    monkeypatch.setattr("qhub.layouts.chunks._CPU", 3 * 512)
    monkeypatch.setattr("qhub.layouts.chunks._PER_THREAD", 1)
    assert torch.equal(layout.decode(parts), whole)
    errors = [float((layout.decode(p) - weights).norm()) for p in (parts, layout.fitted(weights))]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert torch.equal(layout.nearest(weights, parts)["blocks"], parts["blocks"])
