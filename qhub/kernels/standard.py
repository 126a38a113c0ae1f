"""Measures the layouts and sizes that models have, and writes the table that qhub ships for a card.

Run it on a card that no table is shipped for, from the root of the repository::

    python -m qhub.kernels.standard --out qhub/kernels/cards [--seconds 300] [--warm 8] [--layouts 3]
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhub.kernels.contest import Task, warmed
from qhub.kernels.hardware import card_name
from qhub.kernels.spec import Problem
from qhub.kernels.tables import BUCKETS, shipped_file
from qhub.kernels.tune import measured
from qhub.layouts import Activation, Affine, Float8, Grid, Layout, Lookup
from qhub.layouts.tiled import Tiled

__all__ = ["main", "standard_tasks"]

# Of Llama-3 8B and 70B, (N, K): those that span the field first; then fused query, key and value, gate and up.
_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
_MORE = ((1024, 4096), (6144, 4096), (28672, 4096), (8192, 28672), (2048, 2048))


def _layouts(n: int, k: int) -> Iterator[Layout]:
    size: dict[str, Any] = {"out_features": n, "in_features": k}
    yield Affine(**size, bits=4, grid=Grid.along_k(128), zero_point=8.0)
    yield Lookup(**size, bits=4, grid=Grid.along_k(64))
    yield Affine(**size, bits=4, grid=Grid.along_k(64), zero="value")
    yield Affine(**size, bits=8, grid=Grid.along_k(128), zero_point=128.0)
    yield Affine(**size, bits=2, grid=Grid.along_k(64), zero="value")
    yield Float8(**size, grid=Grid("block", 1, k), activation=Activation("float8"))
    yield Affine(
        **size,
        bits=8,
        signed=True,
        grid=Grid("block", 1, k),
        unit=1 / 127,
        activation=Activation("int8", threshold=6.0),
    )


def standard_tasks(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, layouts: int | None = None
) -> Iterator[Task]:
    """Yield what to measure, the most common first; in tiles where a layout can be held so, as on a GPU it is.

    ``layouts``: only so many of them; None: all.
    """
    for shapes in (_SHAPES, _MORE):
        for kind in range(len(list(_layouts(64, 128))[:layouts])):
            for n, k in shapes:
                layout = list(_layouts(n, k))[kind]
                parts = _random(layout, device, dtype)
                if device.type != "cpu" and Tiled.refusal(layout) is None:
                    layout, parts = Tiled.arrange(layout, parts)
                yield Task(Problem(layout, device.type, dtype), parts)


def _random(layout: Layout, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return parts of random codes and small scales."""
    parts = {}
    for name, spec in layout.part_specs().items():
        kind = dtype if dtype in spec.dtypes and name != "table" else spec.dtypes[0]
        if kind.is_floating_point:
            values = torch.rand(spec.shape, device=device) * 0.01 + 1e-3
            parts[name] = (torch.linspace(-1, 1, values.numel(), device=device) if name == "table" else values).to(kind)
        else:
            info = torch.iinfo(kind)
            parts[name] = torch.randint(info.min, info.max, spec.shape, dtype=kind, device=device)
    return parts


def main(arguments: list[str] | None = None) -> None:
    """Measure on the machine's card and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("cards"), help="folder of the table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        help="begin no layer after so long; as long for --warm",
    )
    parser.add_argument("--layouts", type=int, default=None, metavar="N", help="only the N most common; all by default")
    parser.add_argument("--rows", default=",".join(map(str, BUCKETS)), help="numbers of input rows")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="compile in N processes first")
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    rows = [int(one) for one in given.rows.split(",")]
    path = given.out / shipped_file(card_name(device)).name
    start = time.monotonic()
    if given.part is not None:
        first, step = map(int, given.part.split("/"))
        # One number of rows at a time, so that what takes long is spread over all processes.
        jobs = ((task, m) for task in standard_tasks(device, layouts=given.layouts) for m in rows)
        for task, m in itertools.islice(jobs, first, None, step):
            if time.monotonic() - start > given.seconds:
                break
            warmed(task, [m])
        return
    if given.warm:
        own = [sys.executable, "-m", "qhub.kernels.standard", "--device", given.device, "--rows", given.rows]
        own += ["--seconds", str(given.seconds), *(["--layouts", str(given.layouts)] if given.layouts else [])]
        running = [subprocess.Popen([*own, "--part", f"{part}/{given.warm}"]) for part in range(given.warm)]
        for process in running:
            process.wait()
        start = time.monotonic()
    for task in standard_tasks(device, layouts=given.layouts):
        if time.monotonic() - start > given.seconds:
            print(f"stopped after {given.seconds:.0f} s", file=sys.stderr)
            break
        print(measured([task], rows=rows, path=path), flush=True)


if __name__ == "__main__":
    main()
