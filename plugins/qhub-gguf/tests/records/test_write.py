"""Weights are put into records: nearest codes under given scales, and scales at least as good as llama.cpp's."""

from __future__ import annotations

import pytest
import torch
from qhub_gguf.records import RECORDS, record_of
from qhub_gguf.records.kquants import K_QUANTS
from torch import Tensor

from qhub.layouts import Blocks

# Squared error of what is fitted over that of what llama.cpp writes for the same weights: measured, plus 0.004. In most
# types llama.cpp weighs errors by the weights themselves.
RATIOS = {
    "Q4_0": 0.886, "Q4_1": 0.792, "Q5_0": 0.882, "Q5_1": 0.777, "Q8_0": 0.814, "Q1_0": 1.004, "Q2_0": 0.256,
    "TQ1_0": 0.288, "TQ2_0": 0.216, "IQ4_NL": 0.961, "Q2_K": 0.785, "Q3_K": 0.907, "Q4_K": 0.965, "Q5_K": 0.902,
    "Q6_K": 0.916, "IQ4_XS": 0.943, "MXFP4": 0.910, "NVFP4": 0.818, "IQ2_XXS": 0.910, "IQ2_XS": 0.902, "IQ2_S": 0.832,
    "IQ3_XXS": 0.714, "IQ3_S": 0.625, "IQ1_S": 0.840, "IQ1_M": 0.505,
}  # fmt: skip


def _runs(name: str, weights: Tensor) -> Tensor:
    return weights.unflatten(-1, (-1, RECORDS[name].count))


def _error(name: str, records: Tensor, weights: Tensor) -> float:
    decoded = RECORDS[name].decode(records.reshape(-1, RECORDS[name].size)).reshape(weights.shape)
    return float((decoded - weights).double().square().sum() / weights.double().square().sum())


def test_nearest_finds_the_codes_of_decoded_weights(name: str, references: dict[str, Tensor]) -> None:
    record = RECORDS[name]
    data = references[f"{name}.records"].unflatten(-1, (-1, record.size))
    decoded = record.decode(data)
    # The same scales with the codes of other weights.
    other = record.nearest(-decoded.flip(-1), data)
    assert not torch.equal(other, data)
    found = record.decode(record.nearest(decoded, other))
    # Where an offset is far larger than the step, neighbours differ by its last bit.
    tolerance = 4 * 2.0**-24 * decoded.abs().amax(-1, keepdim=True)
    assert bool(((found - decoded).abs() <= tolerance).all())
    if len(record.halves) < 2:
        assert torch.equal(found, decoded)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4", "NVFP4", "TQ1_0"])
def test_nearest_is_the_nearest(name: str, references: dict[str, Tensor]) -> None:
    record = RECORDS[name]
    data = references[f"{name}.written"].unflatten(-1, (-1, record.size))[:2]
    weights = _runs(name, references["weights"].float()[:2]) * 1.1
    error = (record.decode(record.nearest(weights, data)) - weights).abs()
    # Every code that there is, tried by hand.
    steps, offsets = record.steps(data)
    values = torch.tensor(record.table) if record.table else torch.arange(record.low, record.high + 1)
    grid = steps[..., None] * values + (0 if offsets is None else offsets[..., None])
    grouped = weights.unflatten(-1, (-1, record.group))
    least = (grid[..., None, :] - grouped[..., None]).abs().amin(-1).flatten(-2)
    assert torch.allclose(error, least, rtol=0, atol=1e-6 * float(weights.abs().max()))


def test_nearest_of_foreign_weights_beats_other_codes(name: str, references: dict[str, Tensor]) -> None:
    weights = references["weights"].float()
    record = RECORDS[name]
    data = references[f"{name}.written"].unflatten(-1, (-1, record.size))
    changed = weights + 0.3 * weights.roll(1, 0)
    assert _error(name, record.nearest(_runs(name, changed), data), changed) < _error(name, data, changed)


def test_fit_is_nearer_than_llama_cpp(name: str, references: dict[str, Tensor]) -> None:
    weights = references["weights"].float()
    fitted = _error(name, RECORDS[name].fit(_runs(name, weights)), weights)
    assert fitted <= RATIOS[name] * _error(name, references[f"{name}.written"], weights)


def test_fit_heeds_importance(name: str, references: dict[str, Tensor]) -> None:
    weights = references["weights"].float()
    record = RECORDS[name]
    importance = torch.ones(512)
    importance[::16] = 100.0
    plain = record.decode(record.fit(_runs(name, weights))).flatten(-2)
    heeding = record.decode(record.fit(_runs(name, weights), _runs(name, importance))).flatten(-2)
    before, after = (float(((w - weights)[:, ::16]).square().sum()) for w in (plain, heeding))
    assert after < before


@pytest.mark.parametrize("factor", [0.0, 1e-9, 1e-4, 1e4])
def test_fit_of_extreme_weights_is_finite(name: str, factor: float, references: dict[str, Tensor]) -> None:
    weights = references["weights"].float() * factor
    record = RECORDS[name]
    records = record.fit(_runs(name, weights))
    decoded = record.decode(records).flatten(-2)
    assert bool(torch.isfinite(decoded).all()) and bool(torch.isfinite(record.scales(records)).all())
    # A step that float16 cannot hold leaves zeros at worst.
    assert float((decoded - weights).norm()) <= 1.05 * float(weights.norm())
    if factor == 0.0:
        assert not bool(decoded.any())


def test_fit_of_equal_weights(name: str) -> None:
    record = RECORDS[name]
    weights = torch.full((2, record.count), 0.5)
    weights[1] = -0.5
    decoded = record.decode(record.fit(weights))
    # What comes nearest: grids without a sign of their own, and shifted ones, have no vector of equal weights.
    limit = 0.3 if name.startswith(("IQ1", "IQ2", "IQ3")) else 0.04 if name == "NVFP4" else 0.02
    assert float((decoded - weights).abs().mean()) <= limit * 0.5


def test_matrix_is_fitted_as_its_rows_are(name: str, references: dict[str, Tensor]) -> None:
    weights = references["weights"].float()[:2]
    layout = Blocks(out_features=1, in_features=512, record=RECORDS[name])
    importance = torch.linspace(0.1, 2, 512)
    whole = Blocks(out_features=2, in_features=512, record=RECORDS[name]).fitted(weights, importance)
    for row in range(2):
        one = layout.fitted(weights[row : row + 1], importance)
        errors = [
            float(
                ((layout.decode({"blocks": b.reshape(-1, layout.row_bytes)}) - weights[row]) * importance.sqrt()).norm()
            )
            for b in (one["blocks"], whole["blocks"][row])
        ]
        # Sums of other lengths are rounded otherwise, which may turn a scale by its last bit.
        assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("record", K_QUANTS, ids=lambda record: record.name)
def test_levels_are_written_as_they_are_read(record, references: dict[str, Tensor]) -> None:  # type: ignore[no-untyped-def]
    data = references[f"{record.name}.records"].unflatten(-1, (-1, record.size))
    written = data.clone()
    levels = record.levels(data)
    written[..., : record.planes[0].start] = 0
    record.put_levels(written, levels)
    again = record.levels(written)
    assert torch.equal(again.steps, levels.steps)
    assert (levels.offsets is None) == (again.offsets is None)
    assert levels.offsets is None or torch.equal(again.offsets, levels.offsets)


def test_free_steps_are_refused_where_there_are_none() -> None:
    from qhub.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="Q4_K"):
        record_of("Q4_K").put_steps(torch.zeros(1, 144, dtype=torch.uint8), torch.ones(1, 8), None)  # type: ignore[attr-defined]
