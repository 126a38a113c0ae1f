"""The kernels for NVIDIA's GPUs without one: their bodies run on torch tensors, layouts left out.

Layouts say which lane holds what, not what comes out: the compiler refuses a conversion that is said to be trivial and
is not. So every index, mask, table and order of K is checked here, each address against its tensor's bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qhub_triton.codebook.lattice import words_of

from qhub.layouts import Codebook, Grid

fragments = pytest.importorskip("qhub_triton.codebook.fragments")
tabulated = pytest.importorskip("qhub_triton.codebook.tabulated")

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STORED = {**FLOATS, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32}


class Values:
    """Is a tensor with the dtype that it has on the GPU; integers are held as int64."""

    def __init__(self, data: torch.Tensor, dtype: str) -> None:
        self.data, self.dtype = data, dtype

    def combined(self, other: Any, function: Callable[[Any, Any], torch.Tensor]) -> Values:
        dtype, right = self.dtype, other
        if isinstance(other, Values):
            right = other.data
            if other.dtype in FLOATS or (dtype not in FLOATS and other.dtype in ("int64", "uint64", "uint32")):
                dtype = other.dtype
        result = function(self.data, right)
        if result.dtype == torch.bool:
            return Values(result.long(), "bool")
        if result.is_floating_point():
            return Values(result, dtype if dtype in FLOATS else "float32")
        return Values(result & 0xFFFFFFFF if dtype == "uint32" else result, dtype)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __getitem__(self, index: Any) -> Values:
        return Values(self.data[index], self.dtype)

    def to(self, dtype: str, bitcast: bool = False) -> Values:
        if bitcast and dtype == "float16":
            return Values(_signed(self.data, 16).to(torch.int16).view(torch.float16), dtype)
        if dtype in FLOATS:
            return Values(self.data.to(FLOATS[dtype]), dtype)
        wrapped = {"uint16": self.data & 0xFFFF, "uint32": self.data & 0xFFFFFFFF, "int32": _signed(self.data, 32)}
        return Values(wrapped.get(dtype, self.data), dtype)


def _signed(data: torch.Tensor, bits: int) -> torch.Tensor:
    data = data & ((1 << bits) - 1)
    return torch.where(data >= 1 << (bits - 1), data - (1 << bits), data)


def _operator(name: str, function: Callable[[Any, Any], Any]) -> None:
    setattr(Values, f"__{name}__", lambda self, other: self.combined(other, function))
    setattr(Values, f"__r{name}__", lambda self, other: self.combined(other, lambda a, b: function(b, a)))


for _name in ("sub", "mul", "mod", "floordiv", "and_", "or_", "xor", "rshift", "lshift", "lt", "ge"):
    _operator(_name.rstrip("_"), getattr(operator, _name))


class Pointer:
    """Is a tensor and places in it, in bytes."""

    def __init__(self, tensor: torch.Tensor, place: Any = 0, dtype: str | None = None) -> None:
        self.tensor, self.place = tensor, place
        self.stored = dtype or str(tensor.dtype).removeprefix("torch.")
        self.dtype = SimpleNamespace(element_ty=self.stored)

    def __add__(self, offset: Any) -> Pointer:
        steps = offset.data if isinstance(offset, Values) else offset
        return Pointer(self.tensor, self.place + steps * STORED[self.stored].itemsize, self.stored)

    __radd__ = __add__

    def to(self, dtype: Pointer | str) -> Pointer:
        return Pointer(self.tensor, self.place, str(dtype))

    def index(self) -> tuple[torch.Tensor, torch.Tensor]:
        size = STORED[self.stored].itemsize
        place = torch.as_tensor(self.place)
        assert not (place % size).any()
        return self.tensor.view(-1).view(STORED[self.stored]), place // size


def _add(self: Values, other: Any) -> Any:
    return other + self if isinstance(other, Pointer) else self.combined(other, operator.add)


Values.__add__ = Values.__radd__ = _add  # type: ignore[attr-defined]


class Language:
    """Is what the kernels use of Gluon. ``program``: the numbers of the program that runs."""

    program = (0, 0, 0)

    def __getattr__(self, name: str) -> Any:
        if name in {*STORED, "int64", "uint16", "uint32", "uint64"}:
            return name
        raise AttributeError(name)

    SliceLayout = DotOperandLayout = BlockedLayout = staticmethod(lambda *_: None)
    DistributedLinearLayout = NVMMADistributedLayout = BlockedLayout
    pointer_type = staticmethod(lambda dtype: dtype)
    static_range = staticmethod(range)

    def program_id(self, axis: int) -> Values:
        return Values(torch.tensor(self.program[axis]), "int32")

    def arange(self, start: int, stop: int, _: Any) -> Values:
        return Values(torch.arange(start, stop), "int32")

    def zeros(self, shape: list[int], dtype: str, _: Any) -> Values:
        return Values(torch.zeros(shape, dtype=FLOATS[dtype]), dtype)

    def zeros_like(self, values: Values) -> Values:
        return Values(torch.zeros_like(values.data), values.dtype)

    def where(self, condition: Values, one: Values, other: int) -> Values:
        return Values(torch.where(condition.data.bool(), one.data, other), one.dtype)

    def load(self, pointer: Pointer, mask: Values | None = None, other: float = 0, cache_modifier: str = "") -> Values:
        flat, index = pointer.index()
        known = torch.ones((), dtype=torch.bool) if mask is None else mask.data.bool()
        index, known = torch.broadcast_tensors(index, known)
        read = index[known]
        assert not read.numel() or (int(read.min()) >= 0 and int(read.max()) < flat.numel()), "out of bounds"
        found = torch.where(known, flat[torch.where(known, index, 0)], torch.zeros((), dtype=flat.dtype))
        return Values(found if found.is_floating_point() else found.long(), pointer.stored)

    def store(self, pointer: Pointer, values: Values | int, mask: Values | None = None) -> None:
        flat, index = pointer.index()
        known = torch.ones((), dtype=torch.bool) if mask is None else mask.data.bool()
        stored = values.data if isinstance(values, Values) else torch.tensor(values)
        index, known, data = torch.broadcast_tensors(index, known, stored)
        assert bool(((index[known] >= 0) & (index[known] < flat.numel())).all()), "out of bounds"
        flat[index[known]] = data[known].to(flat.dtype)

    def thread_barrier(self) -> None:
        pass

    def atomic_add(self, pointer: Pointer, value: int, sem: str) -> Values:
        assert sem == "acq_rel"
        flat, index = pointer.index()
        before = int(flat[index])
        flat[index] = before + value
        return Values(torch.tensor(before), pointer.stored)

    def join(self, one: Values, other: Values) -> Values:
        return Values(torch.stack(torch.broadcast_tensors(one.data, other.data), dim=-1), one.dtype)

    def split(self, values: Values) -> tuple[Values, Values]:
        return values[..., 0], values[..., 1]

    def reshape(self, values: Values, shape: list[int]) -> Values:
        return Values(values.data.reshape(shape), values.dtype)

    def permute(self, values: Values, order: list[int]) -> Values:
        return Values(values.data.permute(order), values.dtype)

    def expand_dims(self, values: Values, axis: int) -> Values:
        return Values(values.data.unsqueeze(axis), values.dtype)

    def convert_layout(self, values: Values, _: Any, assert_trivial: bool = False) -> Values:
        return values

    def sum(self, values: Values, axis: int) -> Values:
        return Values(values.data.sum(axis), values.dtype)

    def gather(self, values: Values, index: Values, axis: int) -> Values:
        return Values(torch.gather(values.data, axis, index.data), values.dtype)


def _mma(a: Values, b: Values, acc: Values) -> Values:
    assert a.dtype == b.dtype
    return Values(acc.data + a.data.float() @ b.data.float(), "float32")


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> Language:
    """Return the language in which the kernels of both modules run."""
    language = Language()
    for module in (fragments, tabulated):
        for name, value in list(vars(module).items()):
            if hasattr(value, "fn") and name != "gluon":
                monkeypatch.setattr(module, name, value.fn)
        monkeypatch.setattr(module, "gl", language)
        monkeypatch.setattr(module, "mma_v2", _mma)
        for name in ("gdc_wait", "gdc_launch_dependents"):
            monkeypatch.setattr(module, name, lambda: None)
    return language


def _layout(n: int, k: int, nbits: tuple[int, ...], **more: Any) -> Codebook:
    return Codebook(
        out_features=n, in_features=k, nbits=nbits, out_group=1, in_group=8, grid=Grid("block", n, k), **more
    )


def _parts(layout: Codebook) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (layout.out_features, layout.in_features // 8)
    codes = [torch.randint(0, 2**bits, shape, generator=generator) for bits in layout.nbits]
    books = torch.randn(layout.core_specs()["codebooks"].shape, generator=generator)
    if layout.folded:
        books = torch.randint(0, 3, books.shape, generator=generator) + 0.5
        if layout.nbits[-1] == 8:
            books[-1] = torch.randint(-4, 5, books[-1].shape, generator=generator) / 2
    stored = layout.stored_codes(torch.stack(codes, dim=-1))
    return {"codes": stored, "codebooks": books.half(), "scales": torch.ones(1, 1)}


LATTICE = {"folded": (0.25,)}
LAYOUTS = {
    "2x8": _layout(40, 528, (8, 8)),
    "2x8 odd": _layout(33, 520, (8, 8)),
    "1x8": _layout(32, 512, (8,)),
    "4x8": _layout(16, 256, (8,) * 4),
    "1x16": _layout(16, 256, (16,)),
    "2x12": _layout(16, 256, (12, 12)),
    "2x6": _layout(16, 256, (6, 6)),
    "E8P": _layout(40, 768, (16,), folded=(0.25,)),
    "E8P odd": _layout(16, 264, (16,), folded=(0.25,)),
    "E8P 4 bits": _layout(32, 512, (16, 16), folded=(0.25, 0.25), divisors=(1.0, 3.45)),
    "E8P 3 bits": _layout(32, 512, (16, 8), folded=(0.25, None), divisors=(1.0, 2.04)),
}


def _error(found: torch.Tensor, x: torch.Tensor, layout: Codebook, parts: dict[str, torch.Tensor]) -> float:
    wanted = x.double() @ layout.decode(parts).double().T
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("m", "wide", "warps", "tall"), [(1, 8, 4, 1), (5, 8, 8, 2), (11, 16, 4, 2)])
@pytest.mark.parametrize("case", LAYOUTS)
def test_fragments(language: Language, case: str, m: int, wide: int, warps: int, tall: int) -> None:
    layout = LAYOUTS[case]
    parts = _parts(layout)
    words = words_of(layout, parts["codebooks"]) if layout.folded else None
    assert (words is not None) == bool(layout.folded)
    n, blocks, codes = layout.out_features, layout.in_features // 8, parts["codes"]
    size = codes.shape[-1] * codes.element_size()
    pack = {1: 4, 2: 2, 4: 1}.get(size, 0)
    if pack and blocks % pack:
        pack = 1
        codes = codes.view({1: torch.int8, 2: torch.int16}[size])
    elif pack:
        codes = codes.flatten(-2).view(torch.int32)
    x = torch.randn(m, layout.in_features, generator=torch.Generator().manual_seed(1)).half()
    halves = x.float().view(m, -1, 2, 2).sum((1, 3))
    tables = (parts["codebooks"],) * 3 if words is None else (words.rows, words.signs, words.second)
    out = torch.full((m, n), float("nan"))
    part = -(-blocks // (32 * warps)) * 32
    for program in range(-(-n // (16 * tall))):
        language.program = (program, 0, 0)
        fragments.fragments_kernel(
            *(Pointer(one.contiguous()) for one in (x, codes, *tables)), Pointer(out), Pointer(halves.contiguous()),
            m, n, blocks, part, 1, *(Values(torch.tensor(number), "int32") for number in (4, *fragments.MASKS)),
            KIND=words.kind if words else 0, C=len(layout.nbits), BITS=8 if layout.nbits[0] <= 8 else 16,
            ENTRIES=1 << layout.nbits[0], STEPS=words.steps if words else None, ZEROS=words.zeros if words else None,
            PACK=pack, EVEN=part * warps == blocks, OVERLAP=True, W=warps, R=tall, MX=wide,
            LP=None, LC=None, LV=None, LX=None, MMA=None,
        )  # fmt: skip
    # Exact products and float32 sums; words have offsets of up to 256 in them, which are taken off again.
    assert _error(out, x, layout, parts) < (1e-4 if words else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("case", "rows", "pack", "merged"),
    [
        ("2x8", 16, 1, True),
        ("2x8", 16, 2, False),
        ("2x8", 8, 2, True),
        ("2x8 odd", 16, 1, False),
        ("2x8 even", 16, 2, False),
        ("2x8 long", 16, 1, False),
        ("2x8 short", 8, 1, True),
        ("2x8 short", 64, 1, False),
    ],
)
def test_tables(language: Language, case: str, rows: int, pack: int, merged: bool, dtype: torch.dtype) -> None:
    layout = {
        **LAYOUTS,
        "2x8 even": _layout(48, 1024, (8, 8)),
        "2x8 long": _layout(20, 32 * 8 * 66, (8, 8)),
        "2x8 short": _layout(20, 8, (8, 8)),
    }[case]
    parts = _parts(layout)
    n, blocks = layout.out_features, layout.in_features // 8
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, layout.in_features, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    scales = 0.5 + torch.rand(-(-n // 4), generator=generator)
    codes = parts["codes"].view(torch.int16) if pack == 1 else parts["codes"].flatten(-2).view(torch.int32)
    tiles, splits = -(-n // rows), -(-blocks // (32 * pack))
    deep = tabulated.tabulated_shapes(rows, 8, splits)["DEEP"]
    counters = torch.zeros(tiles, dtype=torch.int32)
    shares = torch.full((tiles * splits * rows,), float("nan"))
    wanted = x.double() @ layout.decode(parts).double().T * scales.double().repeat_interleave(4)[:n] + bias.double()
    results = []
    for programs in (range(tiles * splits), reversed(range(tiles * splits))):
        y = torch.full((1, n), float("nan"))
        for program in programs:
            language.program = (program, 0, 0)
            tabulated.tabulated_kernel(
                *(Pointer(one) for one in (x, parts["codebooks"], codes, scales, bias, y, shares, counters)), n, 4,
                BLOCKS=blocks, PACK=pack, SPLITS=splits, BN=rows, MERGED=merged, DEEP=deep,
                EVEN=n % rows == 0 == blocks % (32 * pack), HAS_BIAS=True, OVERLAP=True,
                LT=None, LR=None, LM=None, LS=None, LX=None, LB=None, LF=None, MMA=None,
            )  # fmt: skip
        assert not counters.any()
        assert float((y.double() - wanted).norm() / wanted.norm()) < 1e-6
        results.append(y)
    # Parts are added up in their order, whichever of the programs comes last.
    assert torch.equal(*results)
