"""Writing a dense weight onto a layout: what is there stays, the nearest codes are found, scales are refitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qhub.layouts import Codebook, Float8, Layout

from .cases import CASES, batch, case, fresh

# Sums of several codebooks have no cheap nearest sum; from foreign codes they are only searched greedily.
SUMS = [name for name in CASES if isinstance(book := case(name).layout, Codebook) and len(book.nbits) > 1]
EXACT = [name for name in CASES if name not in SUMS]
SCALAR = [name for name in CASES if not isinstance(case(name).layout, Codebook)]


def _random_weight(name: str, seed: int = 0, amplitude: float = 3.0) -> Tensor:
    """Return Gaussian weights ``amplitude`` times as large as those that the case's scales were made for."""
    dense = case(name).dense
    rng = np.random.default_rng(1000 + seed)
    return torch.from_numpy(rng.standard_normal(dense.shape)).float() * float(dense.square().mean().sqrt()) * amplitude


def _error(layout: Layout, parts: dict[str, Tensor], weight: Tensor) -> float:
    return float((layout.dequantize(parts).double() - weight).norm() / weight.double().norm())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def _scrambled(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``parts`` with all codes and signs zeroed, scales and tables untouched."""
    return {n: torch.zeros_like(p) if n in ("qweight", "codes", "signs") else p for n, p in parts.items()}


@pytest.mark.parametrize("name", EXACT)
def test_keep_finds_the_codes_of_a_decoded_weight(name: str) -> None:
    layout, parts, *_ = case(name)
    decoded = layout.dequantize(parts)
    written = layout.requantize(decoded, _scrambled(parts), "keep")
    layout.validate(written)
    assert torch.equal(layout.dequantize(written), decoded)


@pytest.mark.parametrize("policy", ["keep", "best"])
@pytest.mark.parametrize("name", CASES)
def test_writing_what_is_there_changes_nothing(name: str, policy: str) -> None:
    layout, parts, *_ = case(name)
    decoded = layout.dequantize(parts)
    written = layout.requantize(decoded, parts, policy)  # type: ignore[arg-type]
    assert torch.equal(layout.dequantize(written), decoded)


@pytest.mark.parametrize("name", CASES)
def test_parts_given_are_not_written_into(name: str) -> None:
    layout, parts, *_ = case(name)
    before = fresh(parts)
    layout.requantize(_random_weight(name), parts, "best")
    for part, value in before.items():
        assert _same_bits(parts[part], value), part


@pytest.mark.parametrize("name", CASES)
def test_keep_leaves_all_but_the_codes(name: str) -> None:
    layout, parts, *_ = case(name)
    written = layout.requantize(_random_weight(name), parts, "keep")
    layout.validate(written)
    layout.check_values(written)
    for part, value in parts.items():
        if part not in ("qweight", "codes", "signs"):
            assert _same_bits(written[part], value), part


@pytest.mark.parametrize("name", SCALAR)
def test_keep_takes_the_nearest_of_all_codes(name: str) -> None:
    layout, parts, *_ = case(name)
    # Transforms mix weights; what is searched is the stored matrix.
    target = _random_weight(name, amplitude=1.0)
    found = (layout.decode({**parts, **layout.encode(target, parts, "keep")}) - target).abs()
    least = torch.full_like(found, float("inf"))
    bits = 8 if isinstance(layout, Float8) else layout.bits  # type: ignore[attr-defined]
    for code in range(2**bits):
        if isinstance(layout, Float8) or bits == 8:
            qweight = torch.full(parts["qweight"].shape, code, dtype=torch.uint8).view(parts["qweight"].dtype)
        else:
            # Eight equal codes of b bits repeat every b bytes.
            pattern = sum(code << (bits * i) for i in range(8)).to_bytes(bits, "little")
            row = torch.tensor(list(pattern), dtype=torch.uint8).repeat(-(-parts["qweight"].shape[-1] // bits))
            qweight = row[: parts["qweight"].shape[-1]].expand(parts["qweight"].shape)
        value = layout.decode({**parts, "qweight": qweight})
        least = torch.fmin(least, (value - target).abs())
    # Two codes whose distances differ by less than float32 can tell are equally good.
    assert float((found - least).max()) <= 4 * case(name).tolerance + 2.0**-22 * float(target.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_refit_reduces_the_error(name: str) -> None:
    layout, parts, *_ = case(name)
    weight = _random_weight(name)
    kept, refitted = (layout.requantize(weight, parts, policy) for policy in ("keep", "refit"))  # type: ignore[arg-type]
    layout.validate(refitted)
    layout.check_values(refitted)
    assert _error(layout, refitted, weight) < _error(layout, kept, weight)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("amplitude", [0.9, 3.0])
def test_best_is_as_good_as_either(name: str, amplitude: float) -> None:
    layout, parts, *_ = case(name)
    weight = _random_weight(name, amplitude=amplitude)
    kept, refitted, best = (layout.requantize(weight, parts, policy) for policy in ("keep", "refit", "best"))  # type: ignore[arg-type]
    # A rotation carries the choice over to the dense weight but for its own rounding.
    either = min(_error(layout, kept, weight), _error(layout, refitted, weight))
    assert _error(layout, best, weight) <= either * (1 + 1e-5)


# (group, steps, whether the grid is symmetric about 0) of the formats whose refit spans a group's range in equal steps,
# and of tables no coarser than that in the middle of the range.
UNIFORM = {
    "nf4_nested": (64, 15, True),
    "nf4_ragged": (64, 15, True),
    "int8_outliers": (256, 254, True),
    **{f"hqq{bits}_axis{axis}": (64, 2**bits - 1, False) for bits in (1, 2, 3, 4, 8) for axis in (0, 1)},
    "hqq4_crossing_rows": (64, 15, False),
    **{f"gptq{bits}_act_order": (32, 2**bits - 1, False) for bits in (2, 3, 4, 8)},
    "gptq4_v1_one_group": (256, 15, False),
    "gptq4_symmetric_ragged": (32, 14, True),
    "awq": (64, 15, False),
    "q4_k": (32, 15, False),
    "q6_k": (16, 62, True),
}


@pytest.mark.parametrize("name", UNIFORM)
def test_refit_is_as_near_as_the_number_of_steps_allows(name: str) -> None:
    """The error is that of a uniform quantizer over a group's range, step / sqrt(12) in the root mean square."""
    group, steps, symmetric = UNIFORM[name]
    layout, parts, *_ = case(name)
    weight = _random_weight(name)
    error = _error(layout, layout.requantize(weight, parts, "refit"), weight)
    samples = np.random.default_rng(0).standard_normal((4000, group))
    span = 2 * np.abs(samples).max(1) if symmetric else np.ptp(samples, axis=1)
    expected = float(np.sqrt(np.mean(span**2))) / steps / np.sqrt(12)
    # Half of it is room: integer zeros and 6- or 8-bit scales widen the step, the one step of 1 bit is not uniform
    # noise.
    assert error < 1.5 * expected


@pytest.mark.parametrize(
    ("name", "limit"), [("e4m3_blocks", 2.0**-4), ("e4m3_ragged_blocks", 2.0**-4), ("e5m2_rows", 2.0**-3)]
)
def test_refit_of_float8_is_within_half_a_unit(name: str, limit: float) -> None:
    """A float of m mantissa bits is off by at most 2**-(m + 1) of itself."""
    layout, parts, *_ = case(name)
    weight = _random_weight(name)
    assert _error(layout, layout.requantize(weight, parts, "refit"), weight) < limit


@pytest.mark.parametrize("name", CASES)
def test_zero_is_written_as_zero(name: str) -> None:
    layout, parts, dense, *_ = case(name)
    written = layout.requantize(torch.zeros(dense.shape), parts, "refit")
    layout.check_values(written)
    assert not layout.dequantize(written).any()


@pytest.mark.parametrize("name", CASES)
def test_huge_weights_saturate(name: str) -> None:
    """Scales in half precision cannot follow 1e7; they must not become infinite."""
    layout, parts, *_ = case(name)
    written = layout.requantize(torch.sign(_random_weight(name)) * 1e7, parts, "refit")
    layout.check_values(written)
    assert bool(torch.isfinite(layout.dequantize(written)).all())


@pytest.mark.parametrize("policy", ["keep", "refit"])
@pytest.mark.parametrize("name", CASES)
def test_batch_is_written_matrix_by_matrix(name: str, policy: str) -> None:
    layout, parts, _ = batch(name, 2)
    weights = torch.stack([_random_weight(name, seed) for seed in range(2)])
    written = layout.requantize(weights, parts, policy)  # type: ignore[arg-type]
    layout.validate(written)
    for index in range(2):
        alone = layout.requantize(weights[index], case(name, index).parts, policy)  # type: ignore[arg-type]
        assert torch.equal(layout.dequantize(written)[index], layout.dequantize(alone))


@pytest.mark.parametrize("name", ["nf4_nested", "gptq4_act_order", "aqlm_2x8", "e5m2_rows", "nvfp4"])
def test_best_is_chosen_for_each_matrix_of_a_batch(name: str) -> None:
    """One expert stays as it is, the other outgrows its scales: only the other gets new ones."""
    layout, parts, _ = batch(name, 2)
    weights = torch.stack([layout.dequantize(case(name, 0).parts), _random_weight(name)])
    written = layout.requantize(weights, parts, "best")
    assert torch.equal(layout.dequantize(written)[0], weights[0])
    alone = layout.requantize(weights[1], case(name, 1).parts, "refit")
    assert torch.equal(layout.dequantize(written)[1], layout.dequantize(alone))


@pytest.mark.parametrize("name", SUMS)
def test_sum_of_codebooks_never_gets_worse(name: str) -> None:
    """From its own codes or from none, the search ends no farther away than it began."""
    layout, parts, *_ = case(name)
    weight = layout.dequantize(parts) + 0.1 * _random_weight(name, amplitude=1.0)
    before = _error(layout, parts, weight)
    assert _error(layout, layout.requantize(weight, parts, "keep"), weight) <= before
    scrambled = _scrambled(parts)
    assert _error(layout, layout.requantize(weight, scrambled, "keep"), weight) < _error(layout, scrambled, weight)


@pytest.mark.parametrize("name", SUMS)
def test_sum_of_codebooks_is_nearer_than_the_greedy_one(name: str) -> None:
    layout, parts, *_ = case(name)
    weight = _random_weight(name, amplitude=1.0)
    books, scales = parts["codebooks"].double().numpy(), parts["scales"].double().numpy()
    _, _, out_group, in_group = books.shape
    n, k = weight.shape
    blocks = (weight.double().numpy().reshape(n // out_group, out_group, k) / scales[:, :, None]).reshape(
        n // out_group, out_group, k // in_group, in_group
    )
    left = blocks.transpose(0, 2, 1, 3).reshape(-1, out_group * in_group)
    for book in books.reshape(books.shape[0], -1, out_group * in_group):
        left = left - book[((left[:, None] - book[None]) ** 2).sum(-1).argmin(1)]
    greedy = (left.reshape(n // out_group, -1) ** 2).sum(1) @ scales[:, 0] ** 2
    found = (layout.dequantize(layout.requantize(weight, parts, "keep")).double() - weight).square().sum()
    # The descent takes 3 to 9 % off on random codebooks (see _SWEEPS); 1 % tells it from none.
    assert float(found) < 0.99 * greedy


@pytest.mark.parametrize(
    ("name", "part", "low", "high"),
    [("q4_k", "scales", 0, 63), ("q4_k", "zeros", 0, 63), ("iq4_xs", "scales", -32, 31)],
)
def test_second_level_codes_keep_to_their_bits(name: str, part: str, low: int, high: int) -> None:
    """A K-quant has 6 bits to store them in, whatever the byte in memory could hold; the largest is used."""
    layout, parts, *_ = case(name)
    codes = layout.requantize(_random_weight(name), parts, "refit")[part]
    assert int(codes.min()) >= low
    assert int(codes.max()) == high


def test_scale_of_zero_is_survived() -> None:
    """A feature that an input scale switches off stays off, and does not spoil the others through a division by 0."""
    layout, parts, *_ = case("quip_e8p12")
    parts = fresh(parts)
    parts["in_scale"][3] = 0
    weight = layout.dequantize(parts)
    assert not weight[:, 3].any()
    written = layout.requantize(weight, parts, "keep")
    assert not layout.dequantize(written)[:, 3].any()
    # What the lost column contributed to every rotated one is lost: one part in 64, that is 1/8 in the norm.
    assert _error(layout, written, weight) < 0.25
