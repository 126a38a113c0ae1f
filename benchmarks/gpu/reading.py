"""Measures how long a GPU takes to read as much as a weight of 4 bits takes, and do nothing else: what products face.

    python -m benchmarks.gpu.reading --out FILE

A kernel reads a tensor and writes a number for each program; programs, warps and reads under way vary, the fastest
counts. Timed as the grid's products are: graph replay, back to back, rotating over 300 MB.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import argparse
import itertools
import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from qhub_triton.launch import Launch
from torch import Tensor

from benchmarks.gpu.cells import SHAPES
from benchmarks.gpu.machine import describe
from benchmarks.gpu.timing import bench, copies_for

_PROGRAMS = (1, 2, 4, 8)
_WARPS = (4, 8)
_READS = (1, 2, 4, 8)


@triton.jit
def _read(words, out, COUNT, BLOCK: tl.constexpr, READS: tl.constexpr):
    """Read ``words`` (COUNT,) int32, READS blocks at a time, and write the xor of what this program has read."""
    at = tl.program_id(0) * (BLOCK * READS) + tl.arange(0, BLOCK)
    step = tl.num_programs(0) * (BLOCK * READS)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, COUNT, step):
        read = ()
        for i in tl.static_range(READS):
            place = first + i * BLOCK + at
            read += (tl.load(words + place, mask=place < COUNT, other=0),)
        for i in tl.static_range(READS):
            found ^= read[i]
    tl.store(out + tl.program_id(0), tl.xor_sum(found, 0))


def call_of(copies: list[Tensor], out: Tensor, programs: int, warps: int, reads: int) -> Callable:
    """Return what reads copy i."""
    block = warps * 32 * 4
    launch = Launch(_read, {"BLOCK": block, "READS": reads}, {"num_warps": warps})
    grid = (min(programs, triton.cdiv(copies[0].numel(), block * reads)), 1, 1)

    def call(i: int) -> Tensor:
        launch(grid, 0, copies[i], out, copies[i].numel())
        return out

    return call


def fastest(nbytes: int) -> dict[str, Any]:
    """Return the time of the fastest way to read ``nbytes``, and which it is."""
    copies = [torch.randint(0, 1 << 30, (nbytes // 4,), device="cuda").int() for _ in range(copies_for(nbytes))]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.zeros(processors * max(_PROGRAMS), dtype=torch.int32, device="cuda")
    ways = list(itertools.product(_PROGRAMS, _WARPS, _READS))
    calls = {f"{p}x{processors} programs, {w} warps, {r} reads": call_of(copies, out, p * processors, w, r)
             for p, w, r in ways}  # fmt: skip
    times = bench(calls, len(copies), ms=0.4, rounds=5)
    best = min(times, key=lambda name: times[name])
    return {"bytes": nbytes, "us": round(times[best], 2), "way": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run: dict[str, Any] = {
        "id": uuid.uuid4().hex[:12], "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe(),
        "cells": [],
    }  # fmt: skip
    for n, k in SHAPES:
        # Codes, and a scale of 16 bits for 128 of them.
        nbytes = n * k // 2 + n * k // 128 * 2
        cell = {"n": n, "k": k, **fastest(nbytes)}
        run["cells"].append(cell)
        print(json.dumps(cell), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"runs": [run]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
