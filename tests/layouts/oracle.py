"""What each storage format means, weight by weight in float64: the formulas that the layouts have to agree with.

Written from the formats' own definitions in numpy and plain Python; nothing here uses ``qhub``. Shapes: N output
features, K input features, G groups.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import torch

Array = np.ndarray


def bit_string(codes: Array, bits: int, length: int) -> Array:
    """Return ``codes`` (..., count) as little-endian strings of ``length`` bytes, code i at bit bits*i."""
    rows = []
    for row in codes.reshape(-1, codes.shape[-1]):
        number = sum(int(code) << (bits * index) for index, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(length, "little"), np.uint8))
    return (
        np.stack(rows).reshape(*codes.shape[:-1], length) if rows else np.zeros((*codes.shape[:-1], length), np.uint8)
    )


def rounded(value: Array, dtype: torch.dtype) -> Array:
    """Return float64 ``value`` rounded once to ``dtype``."""
    return torch.from_numpy(np.asarray(value, np.float64)).to(dtype).double().numpy()


# -- bitsandbytes ------------------------------------------------------------------------------------------------------


def double_quantized(codes: Array, table: Array, supers: Array, offset: float, group: int) -> Array:
    """QLoRA (Dettmers et al. 2023, section 3): absmax_i = table[code_i] * super[i // group] + offset."""
    return np.array([table[code] * supers[i // group] + offset for i, code in enumerate(codes.reshape(-1))])


def blockwise(q: Array, table: Array, absmax: Array, block: int) -> Array:
    """w_i = table[q_i] * absmax[i // block], i counting the flattened matrix."""
    flat = [table[code] * absmax[i // block] for i, code in enumerate(q.reshape(-1))]
    return np.array(flat).reshape(q.shape)


def int8_rows(q: Array, absmax: Array) -> Array:
    """LLM.int8() (Dettmers et al. 2022, section 3.2): w_nk = q_nk * absmax_n / 127."""
    return np.array([[code * absmax[n] / 127.0 for code in row] for n, row in enumerate(q.astype(np.float64))])


# -- HQQ, GPTQ, AWQ ----------------------------------------------------------------------------------------------------


def hqq(
    view: Array, scale: Array, zero: Array, axis: int, shape: tuple[int, int], dtype: torch.dtype | None = None
) -> Array:
    """HQQ (Badri & Shaji 2023): (q - zero) * scale on HQQ's 2-D view, a group per row (axis 1) or column (axis 0).

    ``dtype``: each operation is rounded to it; None for none.
    """

    def step(value: Array) -> Array:
        return value if dtype is None else rounded(value, dtype)

    out = np.zeros(view.shape)
    for i in range(view.shape[0]):
        for j in range(view.shape[1]):
            group = i if axis == 1 else j
            out[i, j] = view[i, j] - zero[group]
    out = step(out)
    for i in range(view.shape[0]):
        for j in range(view.shape[1]):
            out[i, j] = out[i, j] * scale[i if axis == 1 else j]
    return step(out).reshape(shape)


def grouped(q: Array, scales: Array, zeros: Array, group_of: Array) -> Array:
    """GPTQ and AWQ: w_nk = scales[g, n] * (q_nk - zeros[g, n]) with g = group_of[k]; scales and zeros are (G, N)."""
    out = np.zeros(q.shape)
    for n in range(q.shape[0]):
        for k in range(q.shape[1]):
            g = group_of[k]
            out[n, k] = scales[g, n] * (float(q[n, k]) - float(zeros[g, n]))
    return out


# -- codebooks ---------------------------------------------------------------------------------------------------------


def aqlm(codes: Array, books: Array, scales: Array) -> Array:
    """AQLM (Egiazarian et al. 2024, eq. 1): block (i, j) is scales[i] * sum_c books[c, codes[i, j, c]]."""
    rows, columns, count = codes.shape
    _, _, out_group, in_group = books.shape
    out = np.zeros((rows * out_group, columns * in_group))
    for i in range(rows):
        for j in range(columns):
            block = np.zeros((out_group, in_group))
            for c in range(count):
                block += books[c, codes[i, j, c]]
            out[i * out_group : (i + 1) * out_group, j * in_group : (j + 1) * in_group] = scales[i] * block
    return out


def signed_grid(codes: Array, grid: Array, signs: Array, scales: Array, group: int) -> Array:
    """IQ3-like: magnitudes of 4 weights from ``grid`` (256, 4), a sign per weight, a scale per ``group`` weights."""
    n_rows, count = codes.shape
    width = grid.shape[1]
    out = np.zeros((n_rows, count * width))
    for n in range(n_rows):
        for k in range(count * width):
            magnitude = grid[codes[n, k // width], k % width]
            out[n, k] = (-magnitude if signs[n, k] else magnitude) * scales[n, k // group]
    return out


# The 29 magnitudes of norm 12 that complete the 227 shorter ones, doubled so that they are odd integers (QuIP#,
# appendix C).
_NORM_12 = (
    "31113333", "13113333", "11313333", "11133333", "33313311", "33313131", "33311331", "33313113", "33311313",
    "33311133", "33133311", "33133131", "33131331", "33133113", "33131313", "33131133", "31333311", "31333131",
    "31331331", "31333113", "31331313", "13331133", "13333311", "13333131", "13331331", "13333113", "13331313",
    "11331333", "33113331",
)  # fmt: skip


@functools.cache
def e8p_codebook() -> Array:
    """Return QuIP#'s E8P12 codebook (65536, 8) (Tseng et al. 2024, section 4.2), entry c for the 16-bit code c.

    High byte: which of 256 magnitudes; low byte: signs in the permuted order, bit 0 corrected to even parity; the
    parity that was there chooses a shift of +1/4 or -1/4.
    """
    short = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(c * c for c in v) <= 10]
    magnitudes = np.array(sorted(short) + [[int(digit) / 2 for digit in word] for word in _NORM_12])
    magnitudes = magnitudes[:, [0, 2, 4, 6, 1, 3, 5, 7]]
    magnitudes[:, 7] *= np.where(magnitudes.sum(1) % 2 == 1, -1.0, 1.0)
    book = np.zeros((65536, 8))
    for low in range(256):
        odd = bin(low).count("1") % 2
        signs = np.array([-1.0 if (low ^ odd) >> bit & 1 else 1.0 for bit in range(8)])
        book[low::256] = (magnitudes * signs)[:, [0, 4, 1, 5, 2, 6, 3, 7]] + (-0.25 if odd else 0.25)
    return book


def hadamard(size: int, factor: Array | None = None) -> Array:
    """Return the orthogonal matrix factor (x) H / sqrt, H_ij = (-1)**popcount(i & j) (Sylvester)."""
    q = 1 if factor is None else factor.shape[0]
    power = size // q
    h = np.array([[(-1.0) ** bin(i & j).count("1") for j in range(power)] for i in range(power)]) / np.sqrt(power)
    return h if factor is None else np.kron(factor, h)


def quip(codes: Array, su: Array, sv: Array, wscale: float, in_factor: Array | None, out_factor: Array | None) -> Array:
    """QuIP# (Tseng et al. 2024, algorithm 1): W = diag(SV * Wscale) . H_N . What . H_K . diag(SU).

    Upstream computes ``had_N(What @ had_K(x * SU)) * SV``, each ``had`` a product with ``hadamard(size)``.
    """
    book = e8p_codebook()
    what = np.concatenate([np.stack([book[code] for code in row]).reshape(1, -1) for row in codes])
    n, k = what.shape
    return np.diag(sv * wscale) @ hadamard(n, out_factor) @ what @ hadamard(k, in_factor) @ np.diag(su)


# -- GGUF --------------------------------------------------------------------------------------------------------------


def tinygemm(q: Array, scales: Array, zeros: Array) -> Array:
    """w_nk = scales_ng * (q_nk - 8) + zeros_ng (pytorch, aten/src/ATen/native/cuda/int4mm.cu)."""
    return np.array(
        [[scales[n, k // 32] * (q[n, k] - 8) + zeros[n, k // 32] for k in range(q.shape[1])] for n in range(len(q))]
    )


def q4_k(q: Array, d: Array, dmin: Array, sc: Array, m: Array) -> Array:
    """Q4_K (llama.cpp ggml-quants.c): d*sc*q - dmin*m; d, dmin per 256 weights, sc, m (6 bits) per 32."""
    flat = q.reshape(-1)
    out = [d[i // 256] * sc[i // 32] * flat[i] - dmin[i // 256] * m[i // 32] for i in range(flat.size)]
    return np.array(out).reshape(q.shape)


def q6_k(q: Array, d: Array, sc: Array) -> Array:
    """Q6_K: d*sc*(q - 32); d per 256 weights, sc (int8) per 16."""
    flat = q.reshape(-1).astype(np.float64)
    return np.array([d[i // 256] * sc[i // 16] * (flat[i] - 32) for i in range(flat.size)]).reshape(q.shape)


def iq4_nl(q: Array, d: Array, table: Array) -> Array:
    """IQ4_NL: d*table[q]; d per 32 weights."""
    return np.array([d[i // 32] * table[code] for i, code in enumerate(q.reshape(-1))]).reshape(q.shape)


def iq4_xs(q: Array, d: Array, ls: Array, table: Array) -> Array:
    """IQ4_XS: d*(ls - 32)*table[q]; d per 256 weights, ls (6 bits) per 32."""
    out = [d[i // 256] * (float(ls[i // 32]) - 32) * table[code] for i, code in enumerate(q.reshape(-1))]
    return np.array(out).reshape(q.shape)


# -- small floats ------------------------------------------------------------------------------------------------------


def small_float(byte: int, exponent_bits: int, mantissa_bits: int) -> float:
    """Return the finite value of a sign-exponent-mantissa code: OCP 8-bit and 4-bit formats, bias 2**(e-1) - 1."""
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = byte & ((1 << mantissa_bits) - 1)
    exponent = byte >> mantissa_bits & ((1 << exponent_bits) - 1)
    sign = -1.0 if byte >> (mantissa_bits + exponent_bits) & 1 else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def float8_blocks(q: Array, scales: Array, block: tuple[int, int], exponent_bits: int, mantissa_bits: int) -> Array:
    """w_nk = float8(q_nk) * scales[n // block_n, k // block_k], q the bytes."""
    out = np.zeros(q.shape)
    for n in range(q.shape[0]):
        for k in range(q.shape[1]):
            out[n, k] = small_float(int(q[n, k]), exponent_bits, mantissa_bits) * scales[n // block[0], k // block[1]]
    return out


def nvfp4(q: Array, scale_bytes: Array, global_scale: float) -> Array:
    """NVFP4 as compressed-tensors stores it: e2m1(q_nk) * e4m3(scale[n, k // 16]) / global."""
    out = np.zeros(q.shape)
    for n in range(q.shape[0]):
        for k in range(q.shape[1]):
            scale = small_float(int(scale_bytes[n, k // 16]), 4, 3)
            out[n, k] = small_float(int(q[n, k]), 2, 1) * scale / global_scale
    return out


# -- activation schemes ------------------------------------------------------------------------------------------------


def near_tie(round_half_even: Callable[[Array], Array], ratio: Array) -> Array:
    """Return where float32 arithmetic may round ``ratio`` to another neighbour than exact arithmetic does."""
    return round_half_even(ratio * (1 - 2.0**-20)) != round_half_even(ratio * (1 + 2.0**-20))


def int8_step(row: Array, threshold: float) -> float:
    """Return absmax / 127 of ``row``, outliers left out (upstream zeroes the entries, not the columns)."""
    return max((abs(v) for v in row if abs(v) < threshold), default=0.0) / 127.0


def int8_linear(x: Array, dense: Array, threshold: float) -> Array:
    """LLM.int8() (Dettmers et al. 2022, eq. 8): columns of x with an outlier in full, the rest rounded to
    absmax/127."""
    outlier = [any(abs(x[m, k]) >= threshold for m in range(x.shape[0])) for k in range(x.shape[1])]
    y = np.zeros((x.shape[0], dense.shape[0]))
    for m in range(x.shape[0]):
        step = int8_step(x[m], threshold)
        y[m] = dense @ np.where(outlier, x[m], np.rint(x[m] / step) * step)
    return y


def e4m3_rounded(x: Array) -> Array:
    """Return ``x`` rounded to the nearest finite E4M3 value, ties to the even mantissa."""
    values = np.array([small_float(code, 4, 3) for code in range(0x7F)])
    magnitude = np.minimum(np.abs(x), values[-1])
    above = np.searchsorted(values, magnitude).clip(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    take_high = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & (above % 2 == 0))
    return np.sign(x) * np.where(take_high, high, low)


def float8_step(x: Array) -> Array:
    """Return absmax / 448 of each row."""
    return np.abs(x).max(axis=1, keepdims=True) / 448.0


def float8_linear(x: Array, dense: Array) -> Array:
    """Return ``x @ dense.T`` with each row of x rounded to E4M3 under a scale of absmax / 448."""
    scale = float8_step(x)
    return (e4m3_rounded(x / scale) * scale) @ dense.T
