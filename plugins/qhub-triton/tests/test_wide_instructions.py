"""The instructions that widen weights for many rows on Hopper, carried out one by one, against plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qhub_triton.tiled.arguments import bytes_of
from qhub_triton.tiled.operands import _TINY, subnormal
from qhub_triton.wide.instructions import float8_scaled, less_zero, lookup_pair

COUNT = 4000
# A weight is rounded once, and by little more where its scale comes in two parts.
ROUNDED = 2.0**-8 * 1.02


def _code(make: Any, *values: Any) -> str:
    return getattr(make, "fn", make)(*values)


def _halves(words: Tensor) -> Tensor:
    """Return the two bfloat16 of each of ``words``, int64 of 32 bits, as (2, n) float64."""
    apart = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF])
    return (apart << 16).to(torch.int32).view(torch.float32).double()


def _joined(values: Tensor) -> Tensor:
    """Return ``values`` (2, n), rounded to bfloat16, as words."""
    low, high = values.float().bfloat16().view(torch.int16).long() & 0xFFFF
    return low | high << 16


def _both(values: Tensor) -> Tensor:
    """Return words that hold each of ``values`` twice."""
    return _joined(torch.stack([values, values]))


def _permuted(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    eight = torch.stack([word >> 8 * i & 255 for word in (a, b) for i in range(4)])
    out = torch.zeros_like(selector)
    for i in range(4):
        code = selector >> 4 * i & 15
        byte = eight.gather(0, (code & 7)[None])[0]
        # The fourth bit of a code asks for the byte's sign instead.
        out |= torch.where(code > 7, (byte >> 7) * 255, byte) << 8 * i
    return out


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "shr": lambda a, by: a >> by,
    "shl": lambda a, by: a << by & 0xFFFFFFFF,
    "prmt": _permuted,
    "add": lambda a, b: _joined(_halves(a) + _halves(b)),
    "mul": lambda a, b: _joined(_halves(a) * _halves(b)),
    "fma": lambda a, b, c: _joined(_halves(a) * _halves(b) + _halves(c)),
}


def _carried_out(code: str, results: int, **given: Tensor) -> list[Tensor]:
    """Return what ``code`` leaves in its first registers, each (2, n) float64, from the words ``given`` as _1, ..."""
    registers = {name.replace("_", "$"): value for name, value in given.items()}
    size = next(iter(given.values())).shape
    for line in code.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, _, rest = line.strip().partition(" ")
        to, *operands = (one.strip() for one in rest.split(","))
        values = [registers[one] if one in registers else torch.full(size, int(one, 0)) for one in operands]
        if name.startswith("lop3"):
            assert operands[3] == "0xEA"
            registers[to] = values[0] & values[1] | values[2]
        else:
            registers[to] = OPERATIONS[name.partition(".")[0]](*values)
    return [_halves(registers[f"${i}"]) for i in range(results)]


def _drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return words, and scales with their part that bfloat16 holds and what it loses, in float64."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 1 << 32, (COUNT,), generator=generator)
    scales = (torch.rand(COUNT, generator=generator) * 0.1 + 1e-4).double()
    own = scales.bfloat16().double()
    return words, scales, own, scales - own


def _codes(words: Tensor, bits: int, place: int) -> Tensor:
    return torch.stack([words >> 16 * half + bits * place & (1 << bits) - 1 for half in (0, 1)])


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found - wanted).abs() <= ROUNDED * wanted.abs()).all())


@pytest.mark.parametrize("scales", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 2])
def test_codes_are_looked_up_in_pairs(place: int, scales: int) -> None:
    words, scale, own, lost = _drawn()
    table = torch.linspace(-1, 1, 16) ** 3 + 0.01
    given = {"_2": words, "_19": _both(own), "_20": _both(lost)}
    for i, word in enumerate(bytes_of(table, torch.bfloat16)[:8].tolist()):
        given[f"_{3 + 2 * i}"] = given[f"_{4 + 2 * i}"] = torch.full((COUNT,), word & 0xFFFFFFFF)
    pair = _carried_out(
        _code(lookup_pair, place, scales), 2, **{k: v for k, v in given.items() if int(k[1:]) < 19 + scales}
    )
    for j, found in enumerate(pair):
        numbers = table.bfloat16().double()[_codes(words, 4, place + j)]
        assert torch.equal(found, numbers) if not scales else _close(found, numbers * (own if scales == 1 else scale))


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(("bits", "place"), [(bits, place) for bits in (2, 4, 8) for place in range(16 // bits)])
def test_zeros_are_taken_off_subnormal_numbers(bits: int, place: int, rounds: bool) -> None:
    words, scale, own, lost = _drawn()
    zeros = torch.randint(0, 256, (COUNT,), generator=torch.Generator().manual_seed(1)).double()
    position = bits * place % 8
    up = 2.0 ** (133 - _TINY - position)
    given = {"_1": words, "_2": _both(-zeros * 2.0 ** (position - 133)), "_3": _both(own * up), "_4": _both(lost * up)}
    (found,) = _carried_out(_code(less_zero, bits, place, rounds), 1, **given)
    assert _close(found * 2.0**_TINY, (_codes(words, bits, place) - zeros) * (scale if rounds else own))


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_is_moved_and_scaled(dtype: torch.dtype, place: int, rounds: bool) -> None:
    words, scale, own, lost = _drawn()
    exponent = 4 if dtype == torch.float8_e4m3fn else 5
    up = 2.0 ** (128 - 2 ** (exponent - 1) - _TINY)
    given = {"_1": words, "_2": _both(own * up), "_3": _both(lost * up)}
    (found,) = _carried_out(_code(float8_scaled, place, exponent, rounds), 1, **given)
    wanted = _codes(words, 8, place).to(torch.uint8).view(dtype).double() * (scale if rounds else own)
    # Infinities and numbers that are none have no place in a weight.
    real = wanted.isfinite()
    assert _close(found[real] * 2.0**_TINY, wanted[real]) and real.float().mean() > 0.9


@pytest.mark.parametrize(("bits", "place"), [(bits, place) for bits in (2, 4, 8) for place in range(16 // bits)])
def test_numbers_without_their_scales_are_exact(bits: int, place: int) -> None:
    words = _drawn()[0]
    point = 2.0 ** (bits - 1)
    one = torch.full((COUNT,), 2.0 ** (133 - _TINY - bits * place % 8), dtype=torch.float64)
    given = {"_1": words, "_2": _both(one), "_3": _both(torch.full_like(one, -point * 2.0**-_TINY))}
    (found,) = _carried_out(_code(subnormal, bits, place, point, True), 1, **given)
    assert torch.equal(found * 2.0**_TINY, _codes(words, bits, place) - point)
