"""Makes and checks every product once, in several processes at a time, so that what compiles on first use is compiled.

    python -m benchmarks.gpu.warming [--shapes ...] [--rows ...] [--contestants ...] [--processes 14]

Triton keeps what it compiled in its disk cache. Each process takes one contestant and shape at a time, and all Ms. As a
command of its own it is the correctness of the whole grid without its times.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence

from benchmarks.gpu.cells import parse_rows, parse_shapes

__all__ = ["warm"]

Job = tuple[str, tuple[int, int], tuple[int, ...]]


def _one(job: Job) -> tuple[str, float, str, list[str]]:
    """Return what was run, how long it took, why it ended early, and the errors by M."""
    name, shape, rows = job
    import torch

    from benchmarks.gpu import timing
    from benchmarks.gpu.case import Case
    from benchmarks.gpu.contestants import ALL
    from benchmarks.gpu.reference import Reference

    # Two copies of the weight are the fewest.
    timing.ROTATED_BYTES = 1.0
    begun = time.perf_counter()
    problem, errors = "", []
    try:
        contestant = ALL[name]
        rows = tuple(m for m in rows if contestant.most is None or m <= contestant.most)
        case = Case(*shape, rows=max(rows))
        prepared = contestant.prepare(case)
        reference = Reference(case, contestant, prepared, rows)
        x = case.inputs(contestant.dtype, contestant.outliers)
        with torch.no_grad():
            for m in rows:
                error, own = reference.errors(prepared.call(x[:m], 1), m)
                mark = "" if error <= contestant.limit else " WRONG"
                errors.append(f"M={m} {error if own is None else own:.4f}{mark}")
        del prepared, case, x, reference
        torch.cuda.empty_cache()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return f"{name} {shape[0]}x{shape[1]}", time.perf_counter() - begun, problem, errors


def warm(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], names: Sequence[str], processes: int, tell: bool = False
) -> None:
    """Run every (contestant, shape) once. What fails or is wrong is printed, with ``tell`` everything; the measuring
    process records it."""
    jobs: list[Job] = [(name, shape, tuple(rows)) for name in names for shape in shapes]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for what, seconds, problem, errors in pool.imap_unordered(_one, jobs):
            wrong = [text for text in errors if "WRONG" in text]
            if tell or problem or wrong or seconds > 20:
                print(f"{what}: {seconds:.1f} s {problem} {', '.join(errors if tell else wrong)}", flush=True)


def main() -> None:
    from benchmarks.gpu.contestants import chosen

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shapes, default=parse_shapes("all"))
    parser.add_argument("--rows", type=parse_rows, default=parse_rows("all"))
    parser.add_argument("--contestants", default="all")
    parser.add_argument("--processes", type=int, default=14)
    arguments = parser.parse_args()
    names = [one.name for one in chosen(arguments.contestants)]
    warm(arguments.shapes, arguments.rows, names, arguments.processes, tell=True)


if __name__ == "__main__":
    main()
