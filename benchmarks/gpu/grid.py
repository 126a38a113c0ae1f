"""Measures the grid: products of quantized weights against every peer that can be had, correctness first.

    python -m benchmarks.gpu.grid --out FILE [--shapes 4096x4096,8192x8192] [--rows 1-128] [--contestants qhub_int4,...]

One call is one run: its ratios hold within it, so cuBLAS and the peers are in it by default. A cell whose error is
above its contestant's limit is not timed. A contestant that cannot be had is recorded with the reason. The file is
written after every M; a call that finds it there goes on in a new run, and with ``--resume`` leaves out the shapes and
Ms that a run of the same machine start has finished. ``--warm N``: first, N processes at once make one call each of
every product, so that what compiles on first use is compiled.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.case import Case, Contestant, Prepared
from benchmarks.gpu.cells import RESTED_FROM, parse_rows, parse_shapes
from benchmarks.gpu.contestants import chosen
from benchmarks.gpu.machine import ceilings, describe
from benchmarks.gpu.reference import Reference
from benchmarks.gpu.timing import capture, replay_times


def prepare(
    case: Case, contestants: Sequence[Contestant], run: dict[str, Any]
) -> dict[str, tuple[Contestant, Prepared]]:
    """Prepare those that can be had; the others' reasons go into the run's ``missing``."""
    ready = {}
    for contestant in contestants:
        try:
            ready[contestant.name] = contestant, contestant.prepare(case)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            run["missing"].setdefault(contestant.name, reason)
            print(f"{contestant.name} cannot be had: {reason}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return ready


def measure(
    case: Case,
    m: int,
    ready: dict[str, tuple[Contestant, Prepared]],
    references: dict[str, Reference],
    rounds: int,
    run: dict[str, Any],
) -> None:
    """Check and time all contestants at ``m`` rows; cells go into the run."""
    replays, cells = {}, {}
    for name, (contestant, prepared) in ready.items():
        if contestant.most is not None and m > contestant.most:
            continue
        x = case.inputs(contestant.dtype, contestant.outliers)[:m]
        cell: dict[str, Any] = {
            "n": case.n, "k": case.k, "m": m, "contestant": name, "group": contestant.group, "peer": contestant.peer,
            "dtype": str(contestant.dtype).removeprefix("torch."), "bytes": prepared.nbytes, "copies": prepared.copies,
        }  # fmt: skip
        try:
            # The allocator hands this memory out again: what a kernel leaves unwritten is no earlier right answer.
            poison = torch.full((m, case.n), float("nan"), dtype=contestant.dtype, device=x.device)
            del poison
            with torch.no_grad():
                y = prepared.call(x, prepared.copies - 1)
            cell["error"], cell["own_error"] = references[name].errors(y, m)
            finite = bool(torch.isfinite(y).all())
            if not finite or not cell["error"] <= contestant.limit:
                wrong = {**cell, "finite": finite, "limit": contestant.limit}
                run["wrong"].append(wrong)
                print(f"WRONG {name} {case.n}x{case.k} M={m}: error {cell['error']:.4f}, finite {finite}", flush=True)
                continue
            replays[name] = capture(partial(prepared.call, x), prepared.copies)
            cells[name] = cell
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            run["failed"].append({**cell, "reason": reason})
            print(f"FAILED {name} {case.n}x{case.k} M={m}: {reason}", flush=True)
            torch.cuda.synchronize()
    for regime in ("busy", "rested") if m >= RESTED_FROM else ("busy",):
        times = replay_times(replays, rounds, rested=regime == "rested", seed=m)
        for name, values in times.items():
            cell = {**cells[name], "regime": regime, "calls": replays[name].calls}
            run["cells"].append({**cell, "rounds": [round(one, 3) for one in values]})
    for replay in replays.values():
        replay.graph.reset()


def table(run: dict[str, Any], n: int, k: int) -> str:
    """Return the microseconds of one shape, a line per contestant, for the log."""
    cells = [c for c in run["cells"] if (c["n"], c["k"], c["regime"]) == (n, k, "busy")]
    rows = sorted({c["m"] for c in cells})
    lines = [f"{n}x{k}".ljust(22) + "".join(f"{m:>9}" for m in rows)]
    for name in dict.fromkeys(c["contestant"] for c in cells):
        own = {c["m"]: sorted(c["rounds"])[len(c["rounds"]) // 2] for c in cells if c["contestant"] == name}
        lines.append(name.ljust(22) + "".join(f"{own[m]:>9.1f}" if m in own else "        -" for m in rows))
    return "\n".join(lines)


def finished(runs: Sequence[dict[str, Any]], start: str, names: set[str]) -> set[tuple[int, int, int]]:
    """Return the (N, K, M) that a run on the machine start ``start`` has finished with all of ``names``."""
    return {
        tuple(done)  # type: ignore[misc]
        for run in runs
        if run["machine"]["start"] == start and names <= set(run["contestants"])
        for done in run["done"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", type=parse_shapes, default=parse_shapes("all"))
    parser.add_argument("--rows", type=parse_rows, default=parse_rows("1-128"))
    parser.add_argument("--contestants", default="all", help="names or groups with commas; -name leaves one out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further M after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--warm", type=int, default=0, metavar="PROCESSES")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    contestants = chosen(arguments.contestants)
    if arguments.warm:
        from benchmarks.gpu.warming import warm

        # Only what compiles on first use is worth a process; loading is what the rest would cost.
        names = [one.name for one in contestants if one.name.startswith(("qhub", "gemlite", "scaled"))]
        warm(arguments.shapes, arguments.rows, names, arguments.warm)
        print(f"warmed in {time.perf_counter() - begun:.1f} s", flush=True)
    stored = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    machine = describe()
    skip = finished(stored, machine["start"], {one.name for one in contestants}) if arguments.resume else set()
    run: dict[str, Any] = {
        "id": uuid.uuid4().hex[:12], "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine,
        "seed": arguments.seed, "rounds": arguments.rounds, "contestants": [one.name for one in contestants],
        "notes": {one.name: one.note for one in contestants if one.note}, "ceilings": [ceilings("before")],
        "missing": {}, "wrong": [], "failed": [], "cells": [], "done": [],
    }  # fmt: skip

    def save() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"runs": [*stored, run]}, separators=(",", ":")))

    print(json.dumps(run["ceilings"][0]), flush=True)
    for n, k in arguments.shapes:
        rows = [m for m in arguments.rows if (n, k, m) not in skip]
        if not rows or time.perf_counter() - begun > arguments.seconds:
            continue
        case = Case(n, k, seed=arguments.seed, rows=max(rows))
        ready = prepare(case, contestants, run)
        references = {name: Reference(case, *both, rows) for name, both in ready.items()}
        torch.cuda.empty_cache()
        for m in rows:
            if time.perf_counter() - begun > arguments.seconds:
                print(f"out of time before {n}x{k} M={m}", flush=True)
                break
            try:
                measure(case, m, ready, references, arguments.rounds, run)
            except torch.AcceleratorError:
                # A kernel that faulted has lost the process its GPU: what was measured is kept.
                traceback.print_exc()
                save()
                raise
            run["done"].append((n, k, m))
            save()
        print(f"{table(run, n, k)}\n({time.perf_counter() - begun:.1f} s)", flush=True)
        del ready, references, case
        gc.collect()
        torch.cuda.empty_cache()
    run["ceilings"].append(ceilings("after"))
    print(json.dumps(run["ceilings"][1]), flush=True)
    run["seconds"] = round(time.perf_counter() - begun, 1)
    save()


if __name__ == "__main__":
    main()
