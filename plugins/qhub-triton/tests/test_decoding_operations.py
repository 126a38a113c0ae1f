"""The fused operations of a decode step against the plain ones in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qhub_triton.decoding.attention import attend_token
from qhub_triton.decoding.gating import gate
from qhub_triton.decoding.norms import add_norm
from qhub_triton.decoding.picking import pick

from qhub.decoding.operations import ACTIVATIONS, REFERENCE, NormRule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Roundings to the dtype in between: the sum, the norm before its weight, the product, the result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}
DTYPES = list(TOLERANCE)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 40, 96, 1000])
@pytest.mark.parametrize("rule", [NormRule(1e-6), NormRule(1e-5, 1.0, False), NormRule(1e-6, 0.0, False)])
def test_add_norm(dtype, size, rule):
    x, delta, weight = (randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(3, 1, size)] * 2 + [(size,)]))
    total, y = add_norm(x, delta, weight, rule)
    # The interpreter cuts bfloat16 off where devices round.
    assert torch.equal(total, x + delta) if DEVICE == "cuda" else error(total, (x + delta).double()) < TOLERANCE[dtype]
    # The norm is of the rounded sum: what the residual stream goes on with.
    wanted = REFERENCE.add_norm(total.double(), None, weight.double(), replace(rule, early=False))[1]
    assert error(y, wanted) < TOLERANCE[dtype]
    same, alone = add_norm(x, None, weight, rule)
    assert same is x
    assert (
        error(alone, REFERENCE.add_norm(x.double(), None, weight.double(), replace(rule, early=False))[1])
        < (TOLERANCE[dtype])
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("size", [1, 33, 700])
def test_gate(dtype, activation, size):
    x = randn(3, 1, 2 * size, dtype=dtype) * 4
    assert error(gate(x, activation), REFERENCE.gate(x.double(), activation)) < TOLERANCE[dtype]


def test_gate_far_out():
    x = torch.tensor([[-1e4, 1e4, 3.0, 2.0]], device=DEVICE)
    for activation in ACTIVATIONS:
        assert torch.allclose(gate(x, activation), torch.tensor([[0.0, 2e4]], device=DEVICE), atol=1e-6)


CASES = [
    # heads, kv heads, size, rotated, capacity, position, window, softcap, norms
    (4, 2, 16, 16, 256, 0, None, None, False),
    (4, 2, 16, 8, 256, 63, None, None, True),
    (4, 4, 8, 8, 256, 64, None, None, False),
    (8, 2, 32, 32, 512, 511, None, None, True),
    (8, 2, 32, 32, 1024, 900, None, 3.0, False),
    (4, 1, 80, 80, 512, 400, 100, None, True),
    (4, 1, 16, 4, 512, 50, 100, None, False),
    (20, 1, 16, 16, 300, 299, 5, 20.0, False),
]


# The interpreter multiplies bfloat16 matrices as if they were integers.
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else DTYPES[:2])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotary", "capacity", "position", "window", "softcap", "norms"), CASES
)
def test_attend_token(dtype, heads, kv_heads, size, rotary, capacity, position, window, softcap, norms):
    batch = 2
    qkv = randn(batch, (heads + 2 * kv_heads) * size, dtype=dtype)
    angle = torch.rand(batch, rotary, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    rule = NormRule(1e-6)
    norm = (randn(size, dtype=dtype, seed=5) / 4 + 1, rule) if norms else None
    wide_norm = (norm[0].double(), replace(rule, early=False)) if norm else None
    caches = [randn(batch, kv_heads, capacity, size, dtype=dtype, seed=i) for i in (1, 2)]
    wide = [cache.double() for cache in caches]
    for cache in caches:
        # What lies past the text, and what is about to be written, must not be read as a number.
        cache[:, :, position:] = float("nan")
    start = torch.tensor([0, position // 3], device=DEVICE)
    place = torch.tensor(position, device=DEVICE)
    rest = (place, start, heads, size**-0.5, window, softcap)
    found = attend_token(qkv, cos, sin, *caches, *rest, norm, norm)
    wanted = REFERENCE.attend_token(qkv.double(), cos.double(), sin.double(), *wide, *rest, wide_norm, wide_norm)
    assert error(found, wanted) < TOLERANCE[dtype]
    for cache, expected in zip(caches, wide, strict=True):
        assert error(cache[:, :, position], expected[:, :, position]) < TOLERANCE[dtype]
        assert torch.equal(cache[:, :, :position].double(), expected[:, :, :position])
        assert bool(cache[:, :, position + 1 :].isnan().all())
    assert torch.equal(found, attend_token(qkv, cos, sin, *caches, *rest, norm, norm))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 5), (3, 1000), (5, 70000)])
def test_pick(dtype, rows, size):
    for seed in range(4):
        # Few different values: the first of equal ones must win.
        logits = (randn(rows, size, dtype=torch.float32, seed=seed) * 2).round().to(dtype)
        ends = torch.full((4,), -1, device=DEVICE)
        ends[0] = logits[0].argmax()
        state = {
            "tokens": torch.zeros(rows, 1, dtype=torch.long, device=DEVICE),
            "unfinished": (torch.arange(rows, device=DEVICE) % 3 != 2).long() * (seed != 1),
            "ends": ends,
            "pad": torch.tensor([7], device=DEVICE),
            "text": torch.zeros(rows, 9, dtype=torch.long, device=DEVICE),
            "position": torch.tensor(4, device=DEVICE),
            "finished": torch.tensor(3 if seed == 2 else -1, device=DEVICE),
        }
        wanted = {name: value.clone() for name, value in state.items()}
        pick(logits, **state)
        REFERENCE.pick(logits, **wanted)
        for name, value in state.items():
            assert torch.equal(value, wanted[name]), name
