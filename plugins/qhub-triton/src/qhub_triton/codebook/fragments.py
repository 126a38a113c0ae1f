"""The product of few rows on NVIDIA's matrix units: what is looked up is the fragment that a lane has to hand over.

A program makes 16 * R rows of the output; its warps share the columns among them. A lane reads eight neighbouring codes
of a row, 16 bytes, and looks up the vectors of just the rows and columns that its place in a matrix fragment wants: the
order of K is chosen to that end, which a sum over K does not mind. Nothing passes through shared memory but the sums of
the warps at the end.

Words of nibbles (:mod:`qhub_triton.codebook.lattice`) become float16 without conversion: put into a mantissa where it
counts as 1, under the exponent of 16 or of 256, a nibble v reads 16 + v or 256 + v. The offsets are multiplied with the
input too, and taken off.

Written in Gluon, triton's language with layouts in the programmer's hands; other GPUs have
:mod:`qhub_triton.codebook.portable`.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["fragments_kernel", "shapes"]

# Where a nibble lies in each half of a word, and the exponent under which it counts there: 256 + v, 16 + v.
_LOW, _HIGH = 0x003C003C, 0x03C003C0
_LOW_EXPONENT, _HIGH_EXPONENT = 0x5C005C00, 0x4C004C00
MASKS = (_LOW, _LOW_EXPONENT, _HIGH, _HIGH_EXPONENT)


def shapes(warps: int, tall: int, rows: int, pack: int) -> dict[str, object]:
    """Return the layouts of a program: of ``tall`` times 16 rows of the weight and ``rows`` (8 or 16) of the input."""
    warp_bits = [[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)]
    down = [[0, 8 << bit, 0] for bit in range(tall.bit_length())]
    lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    along = [[0, 0, 1], [0, 0, 2], [0, 0, 4]]

    def deep(bases: list[list[int]]) -> list[list[int]]:
        return [[*base, 0] for base in bases]

    vector = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4]]
    more = [[0, 8, 0]] if rows == 16 else []
    hold = max(pack, 1)
    few = [[a, b, c // hold] for a, b, c in along if c >= hold]
    held = [[a, b, c // hold] for a, b, c in lanes]
    return {
        "LP": gl.DistributedLinearLayout(few + down, held, warp_bits, [], [warps, 16 * tall, 32 // hold]),
        "LC": gl.DistributedLinearLayout(along + down, lanes, warp_bits, [], [warps, 16 * tall, 32]),
        "LV": gl.DistributedLinearLayout(
            vector + deep(along + down), deep(lanes), deep(warp_bits), [], [warps, 16 * tall, 32, 8]
        ),
        "LX": gl.DistributedLinearLayout(
            vector + deep(along + more), deep(lanes), deep(warp_bits), [], [warps, rows, 32, 8]
        ),
        "MMA": gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8]),
    }


@gluon.jit
def _at(size: gl.constexpr, axis: gl.constexpr, L: gl.constexpr):
    """Return arange(size) along ``axis`` of a tensor of three dimensions in layout ``L``."""
    if axis == 0:
        i = gl.arange(0, size, gl.SliceLayout(1, gl.SliceLayout(2, L)))
        return gl.expand_dims(gl.expand_dims(i, 1), 2)
    elif axis == 1:
        i = gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(2, L)))
        return gl.expand_dims(gl.expand_dims(i, 0), 2)
    else:
        i = gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(0, L)))
        return gl.expand_dims(gl.expand_dims(i, 0), 0)


@gluon.jit
def _in_order(v, W: gl.constexpr, ROWS: gl.constexpr):
    """Return (W, ROWS, 32, 8) as (W, ROWS, 256), K in the order of the fragments that each lane's codes make.

    Of the 32 blocks a lane has eight neighbours; a fragment takes one of each lane's, and of that block two halves.
    """
    v = gl.reshape(v, [W, ROWS, 4, 8, 2, 2, 2])
    return gl.reshape(gl.permute(v, [0, 1, 3, 4, 5, 2, 6]), [W, ROWS, 256])


@gluon.jit
def _numbers(word, masks, W: gl.constexpr, ROWS: gl.constexpr):
    """Return the nibbles of ``word`` (W, ROWS, 32) uint32, offset, as float16 (W, ROWS, 32, 8)."""
    turned = (word >> 8) | (word << 24)
    even = gl.join((word & masks[0]) | masks[1], (turned & masks[0]) | masks[1])
    odd = gl.join((word & masks[2]) | masks[3], (turned & masks[2]) | masks[3])
    pairs = gl.join(even, odd)
    low = (pairs & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True)
    high = (pairs >> 16).to(gl.uint16).to(gl.float16, bitcast=True)
    return gl.reshape(gl.join(low, high), [W, ROWS, 32, 8])


@gluon.jit
def _codes(pointer, at, inside, PACK: gl.constexpr, EVEN: gl.constexpr):
    """Return the words ``at`` as read: integers of ``PACK`` blocks' codes; with 0, three bytes in one integer."""
    if PACK == 0:
        low = gl.load(pointer + at * 3, mask=inside, other=0).to(gl.int32) & 255
        high = gl.load(pointer + at * 3 + 1, mask=inside, other=0).to(gl.int32) & 255
        second = gl.load(pointer + at * 3 + 2, mask=inside, other=0).to(gl.int32) & 255
        return low | (high << 8) | (second << 16)
    elif EVEN:
        return gl.load(pointer + at)
    else:
        return gl.load(pointer + at, mask=inside, other=0)


@gluon.jit
def _field(word, place: gl.constexpr, BITS: gl.constexpr, ENTRIES: gl.constexpr):
    """Return the field of ``BITS`` bits that begins at bit ``place``."""
    word = word.to(gl.uint32, bitcast=True)
    if place + BITS == 32 and ENTRIES == 1 << BITS:
        return word >> place
    elif place == 0:
        return word & (ENTRIES - 1)
    else:
        return (word >> place) & (ENTRIES - 1)


@gluon.jit
def _fields(word, place: gl.constexpr, BITS: gl.constexpr, ENTRIES: gl.constexpr, PACK: gl.constexpr,
            W: gl.constexpr, ROWS: gl.constexpr, LC: gl.constexpr):  # fmt: skip
    """Return the field at bit ``place`` of every block's codes, (W, ROWS, 32) uint32."""
    if PACK < 2:
        return gl.convert_layout(_field(word.to(gl.int32), place, BITS, ENTRIES), LC, assert_trivial=True)
    elif PACK == 2:
        both = gl.join(_field(word, place, BITS, ENTRIES), _field(word, place + 16, BITS, ENTRIES))
        return gl.convert_layout(gl.reshape(both, [W, ROWS, 32]), LC, assert_trivial=True)
    else:
        even = gl.join(_field(word, 0, BITS, ENTRIES), _field(word, 16, BITS, ENTRIES))
        odd = gl.join(_field(word, 8, BITS, ENTRIES), _field(word, 24, BITS, ENTRIES))
        return gl.convert_layout(gl.reshape(gl.join(even, odd), [W, ROWS, 32]), LC, assert_trivial=True)


@gluon.jit
def _word(table, index, size):
    """Return the words (int32) number ``index`` (uint32) of ``table``.

    ``size``: of one, 4. As the compiler does not know it, an address is one multiply-add, on pipes that are idle,
    instead of two shifted additions on the one that all else needs.
    """
    at = table.to(gl.pointer_type(gl.int8)) + index.to(gl.uint64) * size
    return gl.load(at.to(gl.pointer_type(gl.int32)))


@gluon.jit(do_not_specialize=["m_rows", "count", "four"])
def fragments_kernel(
    x, codes, books, signs, second, out, sums, m_rows, n_rows, blocks, part, count, four, m0, o0, m1, o1,
    KIND: gl.constexpr, C: gl.constexpr, BITS: gl.constexpr, ENTRIES: gl.constexpr, STEPS: gl.constexpr,
    ZEROS: gl.constexpr, PACK: gl.constexpr, EVEN: gl.constexpr, OVERLAP: gl.constexpr, W: gl.constexpr,
    R: gl.constexpr, MX: gl.constexpr, LP: gl.constexpr, LC: gl.constexpr, LV: gl.constexpr, LX: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """Write ``out`` (M, N) float32 = x (M, K) float16 @ S.T, M at most ``MX``, scales left out.

    ``codes``: (N, blocks / PACK) integers of ``PACK`` blocks' codes; (N, blocks, 3) bytes for 0. ``KIND`` 0: ``C``
    codes of ``BITS`` bits into ``books`` (C, ENTRIES, 8) float16; 1 to 3: as in
    :class:`qhub_triton.codebook.lattice.Words`. ``part``: blocks of each warp, a multiple of 32; ``EVEN``: the warps'
    parts are the whole row. ``sums``: (M, count, 2) float32, parts
    of the sums of the inputs whose nibbles lie low, and of the others.
    """
    ROWS: gl.constexpr = 16 * R
    LA: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LB: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    masks = (m0.to(gl.uint32), o0.to(gl.uint32), m1.to(gl.uint32), o1.to(gl.uint32))
    # Blocks, and integers that hold the codes of ``PACK`` of them.
    HOLD: gl.constexpr = PACK if PACK > 1 else 1
    word = _at(W, 0, LP) * (part // HOLD) + _at(32 // HOLD, 2, LP)
    words = blocks // HOLD
    row = gl.program_id(0) * ROWS + _at(ROWS, 1, LP)
    row = gl.where(row < n_rows, row, 0)
    at = row.to(gl.int64) * words + word
    size = four.to(gl.uint32).to(gl.uint64)
    xm = gl.expand_dims(_at(MX, 1, gl.SliceLayout(3, LX)), 3)
    xb = gl.expand_dims(_at(W, 0, gl.SliceLayout(3, LX)) * part + _at(32, 2, gl.SliceLayout(3, LX)), 3)
    xj = gl.expand_dims(_at(8, 2, gl.SliceLayout(0, LX)), 0)
    vj = gl.expand_dims(_at(8, 2, gl.SliceLayout(0, LV)), 0)
    xat = (xm * blocks + xb) * 8 + xj
    # Offsets make sums of words large, and matrix units cut off what a large sum has no place for: their chains end
    # after 32 blocks, and are added up with rounding, so that the error is the same for any K.
    zero = gl.zeros([W, ROWS, MX], gl.float32, MMA)
    acc, chain = zero, zero
    acc2, chain2 = zero, zero
    code = _codes(codes, at, (word < words) & (row >= 0), PACK, EVEN)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    if KIND > 0:
        # Sums of the inputs, of those offset by 256 and of the others in turn: a row of them for each warp.
        LT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [W, 1], [1, 0])
        row_of = gl.expand_dims(gl.arange(0, MX, gl.SliceLayout(1, LT)), 1)
        place = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, LT)), 0)
        line = sums + row_of * (count * 2) + place
        added = gl.load(line, mask=(row_of < m_rows) & (place < count * 2), other=0.0)
        for start in range(128, count * 2, 128):
            added += gl.load(line + start, mask=(row_of < m_rows) & (place + start < count * 2), other=0.0)
    for start in range(0, part, 32):
        now = code
        known = (xm < m_rows) & (xb + start < blocks) & (xj >= 0)
        b = _in_order(gl.load(x + xat + start * 8, mask=known, other=0.0), W, MX)
        b = gl.convert_layout(gl.permute(b, [0, 2, 1]), LB, assert_trivial=True)
        if start + 32 < part:
            later = (start + 32) // HOLD
            code = _codes(codes, at + later, (word + later < words) & (row >= 0), PACK, EVEN)
        if KIND == 0:
            for c in gl.static_range(C):
                index = _fields(now, BITS * c, BITS, ENTRIES, PACK, W, ROWS, LC).to(gl.int32)
                index = gl.convert_layout(index, gl.SliceLayout(3, LV), assert_trivial=True)
                v = gl.load(books + (gl.expand_dims(index, 3) * 8 + (c * ENTRIES * 8 + vj)))
                acc = mma_v2(gl.convert_layout(_in_order(v, W, ROWS), LA, assert_trivial=True), b, acc)
        else:
            found = _word(books, _fields(now, 8, 8, 256, PACK, W, ROWS, LC), size)
            found ^= _word(signs, _fields(now, 0, 8, 256, PACK, W, ROWS, LC), size)
            v = _in_order(_numbers(found.to(gl.uint32, bitcast=True), masks, W, ROWS), W, ROWS)
            acc += chain
            chain = mma_v2(gl.convert_layout(v, LA, assert_trivial=True), b, zero)
            if KIND > 1:
                if KIND == 2:
                    found = _word(second, _fields(now, 24, 8, 256, PACK, W, ROWS, LC), size)
                    found ^= _word(signs, _fields(now, 16, 8, 256, PACK, W, ROWS, LC), size)
                else:
                    found = _word(second, _fields(now, 16, 8, 256, PACK, W, ROWS, LC), size)
                v = _in_order(_numbers(found.to(gl.uint32, bitcast=True), masks, W, ROWS), W, ROWS)
                acc2 += chain2
                chain2 = mma_v2(gl.convert_layout(v, LA, assert_trivial=True), b, zero)
    LY: gl.constexpr = gl.SliceLayout(0, MMA)
    if KIND == 0:
        y = gl.sum(acc, 0)
    else:
        y = gl.sum(acc + chain, 0)
        LS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, MMA))
        far = gl.convert_layout(gl.sum(gl.where(place % 2 < 1, added, 0.0), 1), LS)
        near = gl.convert_layout(gl.sum(gl.where(place % 2 >= 1, added, 0.0), 1), LS)
        y = STEPS[0] * (y - gl.expand_dims((256.0 + ZEROS[0]) * far + (16.0 + ZEROS[0]) * near, 0))
        if KIND > 1:
            away = gl.expand_dims((256.0 + ZEROS[1]) * far + (16.0 + ZEROS[1]) * near, 0)
            y += STEPS[1] * (gl.sum(acc2 + chain2, 0) - away)
    n = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LY))
    m = gl.arange(0, MX, gl.SliceLayout(0, LY))
    n = gl.expand_dims(n, 1)
    m = gl.expand_dims(m, 0)
    gl.store(out + (m * n_rows + n), y, mask=(m < m_rows) & (n < n_rows))
