"""Makes every product once, in several processes at a time: what Triton compiles on first use goes to its disk cache.

Each process takes one contestant and shape at a time, a single copy of the weight, and all Ms.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence

__all__ = ["warm"]


def _one(job: tuple[str, tuple[int, int], tuple[int, ...]]) -> tuple[str, float, str]:
    name, shape, rows = job
    import torch

    from benchmarks.gpu import timing
    from benchmarks.gpu.case import Case
    from benchmarks.gpu.contestants import ALL

    timing.ROTATED_BYTES = 1.0
    begun = time.perf_counter()
    problem = ""
    try:
        contestant = ALL[name]
        case = Case(*shape, rows=max(rows))
        prepared = contestant.prepare(case)
        x = case.inputs(contestant.dtype, contestant.outliers)
        with torch.no_grad():
            for m in rows:
                if contestant.most is None or m <= contestant.most:
                    prepared.call(x[:m], 0)
        torch.cuda.synchronize()
        del prepared, case, x
        torch.cuda.empty_cache()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return f"{name} {shape[0]}x{shape[1]}", time.perf_counter() - begun, problem


def warm(shapes: Sequence[tuple[int, int]], rows: Sequence[int], names: Sequence[str], processes: int) -> None:
    """Run every (contestant, shape) once; what fails is printed and left to the measuring process to record."""
    # Only what compiles on first use is worth a process; loading is what the rest would cost.
    names = [name for name in names if name.startswith(("qhub", "gemlite", "scaled"))]
    jobs = [(name, shape, tuple(rows)) for name in names for shape in shapes]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for what, seconds, problem in pool.imap_unordered(_one, jobs):
            if problem or seconds > 20:
                print(f"warming {what}: {seconds:.1f} s {problem}", flush=True)
