"""One function a storage format: random codes as (layout, parts) beside the dense weight of the format's own formula.

Every function takes a seed and returns a :class:`Case`; tables that matrices of a batch share do not depend on the
seed. All formulas are in ``oracle.py``; what is here only names the same numbers twice, once for the layout and once
for the formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qhub.layouts import Activation, Affine, Codebook, Float8, Grid, Layout, Lookup, Nested, Transform

from . import oracle

Array = np.ndarray

# Roundings of one decoded weight in float32, at most: two of nested scales, offset, difference, product, unit.
_ROUNDINGS = 6
# Unit roundoff of float32.
UNIT = 2.0**-24


class Case(NamedTuple):
    """Is one layout with its parts, and the dense weight (N, K) in float64 that they stand for.

    ``terms``: the largest sum of magnitudes that a formula adds up for one weight; what roundings are relative to.
    ``roundings``: how many float32 roundings one weight sees at most; 0 where the result must be exact.
    """

    layout: Layout
    parts: dict[str, Tensor]
    dense: Tensor
    terms: float
    roundings: int = _ROUNDINGS

    @property
    def tolerance(self) -> float:
        """Return the largest error of one weight that float32 rounding can explain."""
        return self.roundings * UNIT * self.terms


def _f16(values: Array) -> Array:
    return values.astype(np.float16)


def _tensor(values: Array, dtype: torch.dtype | None = None) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor if dtype is None else tensor.to(dtype)


def _packed(codes: Array, bits: int) -> Tensor:
    count = codes.shape[-1]
    length = -(-count * bits // 8) if bits in (1, 2, 4, 8) else -(-count // 8) * bits
    return _tensor(oracle.bit_string(codes, bits, length))


def _case(layout: Layout, parts: dict[str, Tensor], dense: Array, terms: float, roundings: int = _ROUNDINGS) -> Case:
    return Case(layout, parts, torch.from_numpy(np.ascontiguousarray(dense)), float(terms), roundings)


# -- bitsandbytes ------------------------------------------------------------------------------------------------------

# QLoRA (Dettmers et al. 2023, appendix E) and bitsandbytes' FP4, in code order; FP4 is neither sorted nor free of a
# second 0.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(sign * v for sign in (1.0, -1.0) for v in (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25))


def _four_bit(table: tuple[float, ...], n: int, k: int, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    values = np.array(table, np.float32)
    # Not bitsandbytes' own map of 256 values: any sorted one has to work, and this one changes sign as theirs does.
    nested_table = np.sort(np.random.default_rng(99).uniform(-1, 1, 256)).astype(np.float32)
    count = -(-n * k // 64)
    q = rng.integers(0, 16, (n, k))
    codes = rng.integers(0, 256, count).astype(np.uint8)
    supers = rng.uniform(0.1, 0.3, -(-count // 256)).astype(np.float32)
    offset = np.float32(0.4)
    scales = oracle.double_quantized(codes, nested_table.astype(float), supers.astype(float), float(offset), 256)
    grid = Grid.flat_runs(64, k)
    layout = Lookup(
        out_features=n,
        in_features=k,
        bits=4,
        grid=grid,
        scales_nested=Nested("uint8", group=256, table=True, offset=True),
    )
    parts = {
        "qweight": _packed(q, 4),
        "table": _tensor(values),
        "scales": _tensor(codes.reshape(grid.scale_shape(n, k))),
        "scales_super": _tensor(supers),
        "scales_table": _tensor(nested_table),
        "scales_offset": torch.tensor(offset),
    }
    return _case(layout, parts, oracle.blockwise(q, values.astype(float), scales, 64), supers.max() + offset)


def nf4_nested(seed: int = 0) -> Case:
    """NF4 with double quantization; 384 scales, so the last second-level group is short."""
    return _four_bit(NF4, 96, 256, seed)


def fp4_nested(seed: int = 0) -> Case:
    """FP4 with double quantization."""
    return _four_bit(FP4, 128, 256, seed)


def nf4_ragged(seed: int = 0) -> Case:
    """NF4 whose runs of 64 cross rows and end short: 33 x 100."""
    return _four_bit(NF4, 33, 100, seed)


def int8_outliers(seed: int = 0) -> Case:
    """LLM.int8() rows; activations in int8 but for columns that reach 6."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-128, 128, (96, 256)).astype(np.int8)
    absmax = rng.uniform(0.01, 0.1, 96).astype(np.float32)
    layout = Affine(
        out_features=96, in_features=256, bits=8, signed=True, grid=Grid.along_k(256), unit=1 / 127,
        activation=Activation("int8", threshold=6.0),
    )  # fmt: skip
    parts = {"qweight": _tensor(q), "scales": _tensor(absmax[:, None])}
    return _case(layout, parts, oracle.int8_rows(q, absmax.astype(float)), 0.11)


# -- HQQ ---------------------------------------------------------------------------------------------------------------


def hqq(bits: int, axis: int, seed: int = 0, n: int = 96, k: int = 256, math: str = "float32") -> Case:
    """HQQ with groups of 64; the view is (N*K/64, 64) for axis 1 and (64, N*K/64) for axis 0."""
    rng = np.random.default_rng(seed)
    groups = n * k // 64
    view = rng.integers(0, 2**bits, (groups, 64) if axis == 1 else (64, groups))
    dtype = torch.bfloat16 if math == "scales" else torch.float32
    scale = _tensor(rng.uniform(0.02, 0.1, groups)).to(dtype)
    zero = _tensor(rng.uniform(0.1, 2**bits - 1, groups)).to(dtype)
    dense = oracle.hqq(
        view, scale.double().numpy(), zero.double().numpy(), axis, (n, k), dtype if math == "scales" else None
    )
    grid = Grid.flat_runs(64, k) if axis == 1 else Grid("strided", 1, 64)
    layout = Affine(out_features=n, in_features=k, bits=bits, grid=grid, zero="value", math=math)  # type: ignore[arg-type]
    shape = grid.scale_shape(n, k)
    parts = {"qweight": _packed(view.reshape(n, k), bits), "scales": scale.reshape(shape), "zeros": zero.reshape(shape)}
    # In the scales' own dtype the result is defined to the last bit.
    return _case(layout, parts, dense, 0.1 * 2 ** (bits + 1), 0 if math == "scales" else _ROUNDINGS)


# -- GPTQ, AWQ ---------------------------------------------------------------------------------------------------------


def gptq(bits: int, seed: int = 0) -> Case:
    """GPTQ with act-order: column k belongs to group g_idx[k]; the layout holds the columns sorted by group."""
    n, k, group = 64, 256, 32
    rng = np.random.default_rng(seed)
    g_idx = rng.permutation(np.repeat(np.arange(k // group), group))
    q = rng.integers(0, 2**bits, (n, k))
    scales = _f16(rng.uniform(0.01, 0.1, (k // group, n)))
    zeros = rng.integers(0, 2**bits, (k // group, n)).astype(np.uint8)
    perm = np.argsort(g_idx, kind="stable")
    layout = Affine(
        out_features=n,
        in_features=k,
        bits=bits,
        grid=Grid.along_k(group),
        zero="value",
        transforms=(Transform("permute", "in"),),
    )
    parts = {
        "qweight": _packed(q[:, perm], bits),
        "scales": _tensor(scales.T),
        "zeros": _tensor(zeros.T),
        "in_perm": _tensor(perm, torch.int32),
    }
    return _case(layout, parts, oracle.grouped(q, scales.astype(float), zeros, g_idx), 0.1 * 2**bits)


def gptq_v1_one_group(seed: int = 0) -> Case:
    """GPTQ v1 with group_size -1: one group a row; the stored zero is one less, so a 4-bit zero reaches 16."""
    n, k = 64, 256
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (n, k))
    scales = _f16(rng.uniform(0.01, 0.1, (1, n)))
    stored = rng.integers(0, 16, (1, n))
    stored[0, 0] = 15
    layout = Affine(out_features=n, in_features=k, bits=4, grid=Grid.along_k(k), zero="value")
    parts = {"qweight": _packed(q, 4), "scales": _tensor(scales.T), "zeros": _tensor((stored + 1).T, torch.uint8)}
    return _case(layout, parts, oracle.grouped(q, scales.astype(float), stored + 1, np.zeros(k, int)), 1.6)


def gptq_symmetric(seed: int = 0) -> Case:
    """GPTQ with sym=True: the zero is the constant 8; K is no multiple of the group, so the last one is short."""
    n, k, group = 64, 208, 32
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (n, k))
    scales = _f16(rng.uniform(0.01, 0.1, (-(-k // group), n)))
    layout = Affine(out_features=n, in_features=k, bits=4, grid=Grid.along_k(group), zero="constant", zero_point=8.0)
    parts = {"qweight": _packed(q, 4), "scales": _tensor(scales.T)}
    return _case(
        layout, parts, oracle.grouped(q, scales.astype(float), np.full(scales.shape, 8), np.arange(k) // group), 0.8
    )


def awq(seed: int = 0) -> Case:
    """AWQ: 4 bits, groups of 64 along K, integer zeros."""
    n, k, group = 128, 256, 64
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (n, k))
    scales = _f16(rng.uniform(0.01, 0.1, (k // group, n)))
    zeros = rng.integers(0, 16, (k // group, n)).astype(np.uint8)
    layout = Affine(out_features=n, in_features=k, bits=4, grid=Grid.along_k(group), zero="value")
    parts = {"qweight": _packed(q, 4), "scales": _tensor(scales.T), "zeros": _tensor(zeros.T)}
    return _case(layout, parts, oracle.grouped(q, scales.astype(float), zeros, np.arange(k) // group), 1.5)


# -- codebooks ---------------------------------------------------------------------------------------------------------


def aqlm(nbits: int, count: int, out_group: int = 1, in_group: int = 8, seed: int = 0) -> Case:
    """AQLM: ``count`` codebooks of 2**nbits vectors, a scale per output block."""
    n, k = 32, 64
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**nbits, (n // out_group, k // in_group, count))
    books = _f16(rng.standard_normal((count, 2**nbits, out_group, in_group)))
    scales = _f16(rng.uniform(0.01, 0.1, n // out_group))
    layout = Codebook(
        out_features=n, in_features=k, nbits=(nbits,) * count, out_group=out_group, in_group=in_group,
        grid=Grid("block", out_group, k),
    )  # fmt: skip
    # The two's complement of the unsigned code, as upstream's int8 and int16 tensors hold it.
    stored = codes.astype(np.int8 if nbits <= 8 else np.int16)
    parts = {"codes": _tensor(stored), "codebooks": _tensor(books), "scales": _tensor(scales[:, None])}
    dense = oracle.aqlm(codes, books.astype(float), scales.astype(float))
    return _case(layout, parts, dense, 0.1 * count * float(np.abs(books).max()))


@functools.cache
def _e8p_tensor() -> Tensor:
    # Entries are multiples of 1/4 up to 3.75: exact in float16.
    return torch.from_numpy(oracle.e8p_codebook()).half()[None, :, None, :]


def _orthogonal(size: int) -> Array:
    """Return a symmetric-free orthogonal factor: a transposed one must give another result."""
    q, _ = np.linalg.qr(np.random.default_rng(7).standard_normal((size, size)))
    return q.astype(np.float32)


def _quip(n: int, k: int, factor: int, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 65536, (n, k // 8))
    # Upstream's SU, SV are signs at first and drift in fine-tuning: signs times a factor near 1.
    su = _f16(rng.choice([-1.0, 1.0], k) * rng.uniform(0.8, 1.2, k))
    sv = _f16(rng.choice([-1.0, 1.0], n) * rng.uniform(0.8, 1.2, n))
    wscale = np.float32(0.02)
    layout = Codebook(
        out_features=n, in_features=k, nbits=(16,), out_group=1, in_group=8, grid=Grid("block", n, k), shared=True,
        transforms=(
            Transform("scale", "in"), Transform("hadamard", "in", factor),
            Transform("hadamard", "out", factor), Transform("scale", "out"),
        ),
    )  # fmt: skip
    parts = {
        "codes": _tensor(codes.astype(np.int16)[..., None]),
        "codebooks": _e8p_tensor(),
        "scales": torch.full((1, 1), float(wscale)),
        "in_scale": _tensor(su),
        "out_scale": _tensor(sv),
    }
    matrix = None
    if factor > 1:
        matrix = _orthogonal(factor)
        parts |= {"in_hadamard": _tensor(matrix), "out_hadamard": _tensor(matrix.T)}
    in_factor = None if matrix is None else matrix.astype(float)
    out_factor = None if matrix is None else matrix.T.astype(float)
    dense = oracle.quip(codes, su.astype(float), sv.astype(float), float(wscale), in_factor, out_factor)
    # A rotated weight adds up at most ||What||_F: each row of H has norm 1 (Cauchy-Schwarz). Every butterfly stage, the
    # factor's three terms and the normalisation round once each.
    norm = float(np.linalg.norm(oracle.e8p_codebook()[codes]))
    stages = int(np.log2(n // factor) + np.log2(k // factor)) + 8
    return _case(layout, parts, dense, float(wscale) * 1.44 * norm, stages + 4)


def quip_e8p12(seed: int = 0) -> Case:
    """QuIP# E8P12 with signs and Hadamard rotations on both sides."""
    return _quip(32, 64, 1, seed)


def quip_e8p12_factor(seed: int = 0) -> Case:
    """QuIP# where N and K are 3 times a power of two: a given 3 x 3 orthogonal factor times Sylvester's matrix."""
    return _quip(24, 48, 3, seed)


def signed_grid(seed: int = 0) -> Case:
    """IQ3-like: 4 magnitudes a code, a sign bit per weight, scales per 32."""
    n, k = 64, 256
    rng = np.random.default_rng(seed)
    codes, signs = rng.integers(0, 256, (n, k // 4)), rng.integers(0, 2, (n, k))
    grid = _f16(np.random.default_rng(98).uniform(0.5, 8, (256, 4)))
    scales = _f16(rng.uniform(0.01, 0.1, (n, k // 32)))
    layout = Codebook(
        out_features=n,
        in_features=k,
        nbits=(8,),
        out_group=1,
        in_group=4,
        grid=Grid.along_k(32),
        shared=True,
        signs=True,
    )
    parts = {
        "codes": _tensor(codes.astype(np.int8)[..., None]),
        "codebooks": _tensor(grid)[None, :, None, :],
        "scales": _tensor(scales),
        "signs": _packed(signs, 1),
    }
    return _case(layout, parts, oracle.signed_grid(codes, grid.astype(float), signs, scales.astype(float), 32), 0.8)


# -- GGUF --------------------------------------------------------------------------------------------------------------

# kvalues_iq4nl in llama.cpp's ggml-common.h.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def q4_k(seed: int = 0) -> Case:
    """Q4_K: d*sc*q - dmin*m, sc and m of 6 bits per 32 weights under d and dmin per 256."""
    n, k = 64, 512
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (n, k))
    d, dmin = (_f16(rng.uniform(0.001, 0.004, n * k // 256)) for _ in range(2))
    sc, m = (rng.integers(0, 64, n * k // 32).astype(np.uint8) for _ in range(2))
    nested = Nested("uint8", group=8, bits=6)
    layout = Affine(
        out_features=n,
        in_features=k,
        bits=4,
        grid=Grid.along_k(32),
        zero="offset",
        scales_nested=nested,
        zeros_nested=nested,
    )
    parts = {
        "qweight": _packed(q, 4),
        "scales": _tensor(sc.reshape(n, -1)),
        "scales_super": _tensor(d),
        "zeros": _tensor(m.reshape(n, -1)),
        "zeros_super": _tensor(-dmin),
    }
    return _case(layout, parts, oracle.q4_k(q, d.astype(float), dmin.astype(float), sc, m), 0.004 * 63 * 16)


def tinygemm(seed: int = 0) -> Case:
    """tinygemm's int4: scale*(q - 8) + zero in bfloat16 per 32 weights."""
    n, k = 24, 96
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (n, k))
    scales, zeros = (torch.from_numpy(rng.uniform(low, 0.1, (n, k // 32))).to(torch.bfloat16) for low in (0.01, -0.1))
    layout = Affine(out_features=n, in_features=k, bits=4, grid=Grid.along_k(32), zero="offset", zero_point=8.0)
    parts = {"qweight": _packed(q, 4), "scales": scales, "zeros": zeros}
    dense = oracle.tinygemm(q, scales.double().numpy(), zeros.double().numpy())
    return _case(layout, parts, dense, 0.1 * 8 + 0.1)


def q6_k(seed: int = 0) -> Case:
    """Q6_K: d*sc*(q - 32), sc int8 per 16 weights under d per 256."""
    n, k = 64, 512
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 64, (n, k))
    d = _f16(rng.uniform(0.0001, 0.0004, n * k // 256))
    sc = rng.integers(-128, 128, n * k // 16).astype(np.int8)
    layout = Affine(
        out_features=n,
        in_features=k,
        bits=6,
        grid=Grid.along_k(16),
        zero_point=32.0,
        scales_nested=Nested("int8", group=16),
    )
    parts = {"qweight": _packed(q, 6), "scales": _tensor(sc.reshape(n, -1)), "scales_super": _tensor(d)}
    return _case(layout, parts, oracle.q6_k(q, d.astype(float), sc), 0.0004 * 128 * 32)


def iq4_nl(seed: int = 0) -> Case:
    """IQ4_NL: d*table[q], d per 32 weights."""
    n, k = 96, 256
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (n, k))
    d = _f16(rng.uniform(0.0001, 0.001, n * k // 32))
    layout = Lookup(out_features=n, in_features=k, bits=4, grid=Grid.along_k(32))
    parts = {
        "qweight": _packed(q, 4),
        "table": torch.tensor(IQ4, dtype=torch.float32),
        "scales": _tensor(d.reshape(n, -1)),
    }
    return _case(layout, parts, oracle.iq4_nl(q, d.astype(float), np.array(IQ4, float)), 0.127)


def iq4_xs(seed: int = 0) -> Case:
    """IQ4_XS: d*(ls - 32)*table[q], ls of 6 bits per 32 weights under d per 256."""
    n, k = 64, 512
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (n, k))
    d = _f16(rng.uniform(0.00001, 0.0001, n * k // 256))
    ls = rng.integers(0, 64, n * k // 32)
    layout = Lookup(
        out_features=n, in_features=k, bits=4, grid=Grid.along_k(32), scales_nested=Nested("int8", group=8, bits=6)
    )
    parts = {
        "qweight": _packed(q, 4),
        "table": torch.tensor(IQ4, dtype=torch.float32),
        "scales": _tensor((ls - 32).astype(np.int8).reshape(n, -1)),
        "scales_super": _tensor(d),
    }
    return _case(layout, parts, oracle.iq4_xs(q, d.astype(float), ls, np.array(IQ4, float)), 0.0001 * 32 * 127)


# -- small floats ------------------------------------------------------------------------------------------------------


def _finite_bytes(rng: np.random.Generator, shape: tuple[int, int], exponent_bits: int, mantissa_bits: int) -> Array:
    """Return random float8 bytes without NaN and infinity."""
    q = rng.integers(0, 256, shape).astype(np.uint8)
    magnitude = q & 0x7F
    # E4M3FN spends one code on NaN (0x7F); E5M2 spends its last exponent on infinity and NaN.
    special = magnitude == 0x7F if exponent_bits == 4 else magnitude >= 0x7C
    assert mantissa_bits == 7 - exponent_bits
    return np.where(special, 0x40, q).astype(np.uint8)


def _float8(n: int, k: int, block: tuple[int, int], exponent_bits: int, activation: Activation, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    name, mantissa_bits = ("e4m3fn", 3) if exponent_bits == 4 else ("e5m2", 2)
    q = _finite_bytes(rng, (n, k), exponent_bits, mantissa_bits)
    shape = (-(-n // block[0]), -(-k // block[1]))
    largest = 448.0 if exponent_bits == 4 else 57344.0
    scales = (rng.uniform(0.05, 0.1, shape) / largest).astype(np.float32)
    layout = Float8(out_features=n, in_features=k, format=name, grid=Grid("block", *block), activation=activation)  # type: ignore[arg-type]
    parts = {"qweight": _tensor(q).view(layout.dtype), "scales": _tensor(scales)}
    return _case(
        layout, parts, oracle.float8_blocks(q, scales.astype(float), block, exponent_bits, mantissa_bits), 0.1, 1
    )


def e4m3_blocks(seed: int = 0) -> Case:
    """E4M3 under a scale per 128 x 128 block."""
    return _float8(256, 256, (128, 128), 4, Activation(), seed)


def e4m3_ragged_blocks(seed: int = 0) -> Case:
    """E4M3 under 128 x 128 blocks that do not divide 200 x 300."""
    return _float8(200, 300, (128, 128), 4, Activation(), seed)


def e4m3_dynamic(seed: int = 0) -> Case:
    """E4M3 under one scale, activations rounded to E4M3 per row."""
    return _float8(96, 256, (96, 256), 4, Activation("float8"), seed)


def e5m2_rows(seed: int = 0) -> Case:
    """E5M2 under a scale per row."""
    return _float8(96, 256, (1, 256), 5, Activation(), seed)


def nvfp4(seed: int = 0) -> Case:
    """NVFP4: E2M1 codes, an E4M3 scale per 16 weights, one global divisor."""
    n, k = 96, 256
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (n, k))
    scale_bytes = rng.integers(0x20, 0x7F, (n, k // 16)).astype(np.uint8)
    divisor = np.float32(rng.uniform(4000, 5000))
    table = [oracle.small_float(code, 2, 1) for code in range(16)]
    layout = Lookup(
        out_features=n, in_features=k, bits=4, grid=Grid.along_k(16),
        scales_nested=Nested("float8_e4m3fn", group=0, divide=True),
    )  # fmt: skip
    parts = {
        "qweight": _packed(q, 4),
        "table": torch.tensor(table, dtype=torch.float32),
        "scales": _tensor(scale_bytes).view(torch.float8_e4m3fn),
        "scales_super": torch.tensor([divisor]),
    }
    return _case(layout, parts, oracle.nvfp4(q, scale_bytes, float(divisor)), 6 * 448 / 4000)


CASES: dict[str, Callable[..., Case]] = {
    "nf4_nested": nf4_nested,
    "fp4_nested": fp4_nested,
    "nf4_ragged": nf4_ragged,
    "int8_outliers": int8_outliers,
    **{f"hqq{bits}_axis{axis}": functools.partial(hqq, bits, axis) for bits in (1, 2, 3, 4, 8) for axis in (0, 1)},
    "hqq4_crossing_rows": functools.partial(hqq, 4, 1, k=200),
    "hqq8_bf16": functools.partial(hqq, 8, 1, math="scales"),
    **{f"gptq{bits}_act_order": functools.partial(gptq, bits) for bits in (2, 3, 4, 8)},
    "gptq4_v1_one_group": gptq_v1_one_group,
    "gptq4_symmetric_ragged": gptq_symmetric,
    "awq": awq,
    "aqlm_1x16": functools.partial(aqlm, 16, 1),
    "aqlm_2x8": functools.partial(aqlm, 8, 2),
    "aqlm_3x6_2d_blocks": functools.partial(aqlm, 6, 3, 2, 4),
    "quip_e8p12": quip_e8p12,
    "quip_e8p12_factor3": quip_e8p12_factor,
    "signed_grid": signed_grid,
    "tinygemm": tinygemm,
    "q4_k": q4_k,
    "q6_k": q6_k,
    "iq4_nl": iq4_nl,
    "iq4_xs": iq4_xs,
    "e4m3_blocks": e4m3_blocks,
    "e4m3_ragged_blocks": e4m3_ragged_blocks,
    "e4m3_dynamic": e4m3_dynamic,
    "e5m2_rows": e5m2_rows,
    "nvfp4": nvfp4,
}


@functools.cache
def case(name: str, seed: int = 0) -> Case:
    """Return the case ``name``; tests share it and must not write into its parts."""
    return CASES[name](seed=seed)


def fresh(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of ``parts`` that a test may write into."""
    return {name: part.clone() for name, part in parts.items()}


def batch(name: str, count: int) -> tuple[Layout, dict[str, Tensor], Tensor]:
    """Return layout, stacked parts and dense (count, N, K) of ``count`` different matrices on one layout."""
    cases = [case(name, seed) for seed in range(count)]
    layout = cases[0].layout
    parts = {}
    for part, spec in layout.part_specs().items():
        column = [one.parts[part] for one in cases]
        parts[part] = torch.stack(column) if spec.batched else column[0]
    return layout, parts, torch.stack([one.dense for one in cases])
