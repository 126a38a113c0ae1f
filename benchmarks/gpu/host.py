"""Measures what one eager call of a layer costs the host: ``nn.Linear``, qhub's layers, and the calls of peers.

    python -m benchmarks.gpu.host --out FILE [--contestants ...] [--size 1024] [--profile NAME...]

The weight is so small that the GPU waits for the host: wall time of a call, Python, allocation and launches included.
Layers take turns in a new random order each round; a figure is the median of the rounds. One row of input, no gradient.
``--profile``: prints where Python spends the time of these layers.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import statistics
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.case import Case, Contestant
from benchmarks.gpu.contestants import ALL, chosen
from benchmarks.gpu.machine import describe
from benchmarks.gpu.qhub_contestants import MAKERS, weight_of

PLAIN = "nn_linear"
Call = Callable[[], Tensor]


def layer_of(case: Case, name: str) -> nn.Module:
    """Return the layer that a quantized model has, for one of qhub's contestants."""
    from qhub.modules import QuantLinear

    layout, parts = MAKERS[name.removeprefix("qhub_").removesuffix("_fp16")](case)
    layer = QuantLinear.hollow(case.k, case.n, None, ALL[name].dtype)
    layer._parameters["weight"] = weight_of(layout, parts, ALL[name].dtype)  # type: ignore[assignment]
    return layer


def plain_layer(case: Case) -> nn.Module:
    """Return the dense layer."""
    layer = nn.Linear(case.k, case.n, bias=False, device="meta", dtype=torch.bfloat16)
    layer.weight = nn.Parameter(case.weight, requires_grad=False)
    return layer


def calls_of(case: Case, contestants: list[Contestant], missing: dict[str, str]) -> dict[str, Call]:
    """Return what makes one call of each contestant, and of ``nn.Linear``; who cannot be had goes to ``missing``."""
    calls: dict[str, Call] = {PLAIN: partial(plain_layer(case), case.inputs(torch.bfloat16)[:1])}
    for one in contestants:
        x = case.inputs(one.dtype, one.outliers)[:1]
        try:
            calls[one.name] = (
                partial(one.prepare(case).call, x, 0) if one.peer else partial(layer_of(case, one.name), x)
            )
            for _ in range(5):
                calls[one.name]()
            torch.cuda.synchronize()
        except Exception as error:
            calls.pop(one.name, None)
            missing[one.name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return calls


def measure(calls: dict[str, Call], rounds: int = 15, count: int = 200) -> dict[str, list[float]]:
    """Return {name: microseconds of one call, a figure a round}."""
    shuffle, names = random.Random(0), list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        shuffle.shuffle(names)
        for name in names:
            call = calls[name]
            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / count * 1e6)
    return times


def profile(call: Call, count: int = 1000, lines: int = 14) -> None:
    """Print where Python spends the time of ``count`` calls."""
    with cProfile.Profile() as found:
        for _ in range(count):
            call()
    torch.cuda.synchronize()
    pstats.Stats(found).sort_stats("tottime").print_stats(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contestants", default="qhub", help="names or groups with commas; -name leaves one out")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", nargs="*", default=[])
    arguments = parser.parse_args()
    case = Case(arguments.size, arguments.size, rows=1)
    missing: dict[str, str] = {}
    with torch.no_grad():
        calls = calls_of(case, chosen(arguments.contestants), missing)
        times = measure(calls, arguments.rounds)
        for name in arguments.profile:
            print(name)
            profile(calls[name])
    run: dict[str, Any] = {
        "id": uuid.uuid4().hex[:12], "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe(),
        "size": arguments.size, "missing": missing,
        "host_us": {name: round(statistics.median(own), 2) for name, own in times.items()},
        "rounds": {name: [round(one, 2) for one in own] for name, own in times.items()},
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"runs": [run]}, indent=1) + "\n")
    for name, cost in run["host_us"].items():
        print(f"{name:24} {cost:7.1f} us")
    for name, reason in missing.items():
        print(name, "missing:", reason)


if __name__ == "__main__":
    main()
