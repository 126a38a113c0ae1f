"""Tables in shared memory, without a GPU: what is written and read, carried out in plain arithmetic, and that it
compiles so that no order of elements is changed for a lookup."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_triton.tiled import banks
from qhub_triton.tiled.arguments import bytes_of

triton = pytest.importorskip("triton")

LANES = 32


def _code(make: Any, *values: Any) -> str:
    return getattr(make, "fn", make)(*values)


def _number(text: str, known: dict[str, int]) -> int:
    return known[text] if text in known else int(text, 0)


def _written(pairs: list[int], threads: int) -> dict[int, int]:
    """Return what the instructions of ``threads`` leave in shared memory, {address: word}."""
    code, memory = _code(banks._writing, threads), {}
    source = [int(one) for one in re.findall(r"ld\.global\.nc\.b32 v, \[p \+ (\d+)\]", code)]
    target = [int(one) for one in re.findall(r"st\.shared\.v4\.b32 \[a \+ (\d+)\]", code)]
    assert len(source) == len(target) == 2048 // threads
    assert "mad.lo.u32 a, t, 16, a" in code and "shr.u32 e, t, 3; mul.wide.u32 p, e, 4" in code
    for thread in range(threads):
        for start, to in zip(source, target, strict=True):
            for lane in range(4):
                memory[thread * 16 + to + 4 * lane] = pairs[((thread >> 3) * 4 + start) // 4]
    return memory


def _read(place: int, words: int, lane: int, memory: dict[int, int]) -> int:
    """Return what the instructions of one lane read for two words."""
    known = {"$1": words, "qhub_banks": 0, "%tid.x": lane + 96}
    for line in _code(banks._reading, place).strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        operands = [one.strip() for one in rest.split(",")]
        if name in ("", ".reg"):
            continue
        values = [0 if one.startswith("[") else _number(one, known) for one in operands[1:]]
        if name == "ld.shared.b32":
            return memory[known[operands[1].strip("[]")]]
        found = {
            "mov.u32": lambda v: v[0],
            "mov.b32": lambda v: v[0],
            "and.b32": lambda v: v[0] & v[1],
            "shl.b32": lambda v: v[0] << v[1] & 0xFFFFFFFF,
            "shr.b32": lambda v: v[0] >> v[1],
            "mad.lo.u32": lambda v: v[0] * v[1] + v[2],
            # Both halves of the first with the two lower bytes of the second.
            "dp2a.lo.u32.u32": lambda v: (v[0] & 0xFFFF) * (v[1] & 255) + (v[0] >> 16) * (v[1] >> 8 & 255) + v[2],
        }[name](values)
        known[operands[0]] = found
    raise AssertionError("nothing is read")


@pytest.mark.parametrize("threads", [64, 128, 256, 512])
def test_all_copies_are_written(threads):
    memory = _written(list(range(256)), threads)
    assert memory == {(pair * LANES + lane) * 4: pair for pair in range(256) for lane in range(LANES)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lane_reads_the_numbers_of_its_words(dtype):
    table = torch.randn(16, generator=torch.Generator().manual_seed(0))
    pairs = [int(one) & 0xFFFFFFFF for one in bytes_of(table, dtype)[banks._PAIRS :]]
    memory, short = _written(pairs, 128), table.to(dtype)
    generator = torch.Generator().manual_seed(1)
    for lane in range(LANES):
        first, second = (int(one) for one in torch.randint(0, 1 << 16, (2,), generator=generator))
        for place in range(4):
            found = _read(place, first | second << 16, lane, memory)
            # Its own bank: no two lanes ask the same one.
            both = torch.tensor([found & 0xFFFF, found >> 16], dtype=torch.int32).to(torch.int16).view(dtype)
            wanted = short[[first >> 4 * place & 15, second >> 4 * place & 15]]
            assert torch.equal(both, wanted)


def _compiled() -> str:
    """Return the code of the kernel for few rows."""
    from qhub_triton.tiled.few import few
    from triton.backends.compiler import GPUTarget

    constants: dict[str, Any] = {
        "BITS": 4, "KIND": 1, "GROUP": 64, "ZERO": 0, "ZERO_POINT": 0.0, "UNIT": 1.0, "NESTED": None,
        "ZERO_NESTED": None, "HAS_BIAS": False, "NATIVE": True, "OVERLAP": 2, "WARPS": 8, "TALL": 2, "AHEAD": 2,
        "TURNS": 0, "BLOCK_M": 8,
    }  # fmt: skip
    floats = ("supers", "super_table", "super_offset", "zero_supers")
    types = {"x": "*bf16", "words": "*i16", "scales": "*bf16", "zeros": "*u8", "table": "*i32", "bias": "*bf16"}
    types |= {"y": "*bf16", **dict.fromkeys(floats, "*fp32")}
    signature = {name: types.get(name, "i32") for name in few.arg_names if name not in constants}
    aligned = ("x", "words", "scales", "y", "N", "K", "stride_xm", "stride_ym")
    source = triton.compiler.ASTSource(
        few,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(few.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]


@pytest.mark.skipif(sys.platform != "linux", reason="triton comes with an assembler for Linux")
def test_few_rows_compile_without_changing_orders(tmp_path):
    # In a process without the interpreter, which stands in for the compiler in this one.
    command = [sys.executable, __file__, str(tmp_path / "few.ptx")]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    code = (tmp_path / "few.ptx").read_text()
    assert code.count(".shared .align 16 .b8 qhub_banks[32768]") == 1
    # Two blocks of 32 rows for a warp: 128 pairs of a thread, each of two words that were read as one.
    assert code.count("dp2a") == 128 and "prmt" not in code


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(_compiled())
