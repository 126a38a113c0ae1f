"""Says what the CPU kernels run on: numba, the instruction set, the threads, and where compiled code is kept."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

from qhub.reports import Finding

__all__ = ["findings"]

_SUBJECT = "qhub-cpu"


def findings() -> list[Finding]:
    """Return what works here; numba is imported if it is installed."""
    if importlib.util.find_spec("numba") is None:
        return [
            Finding(
                "warning",
                _SUBJECT,
                "numba is not installed: quantized layers run on the slow reference",
                "pip install numba",
            )
        ]
    from qhub_cpu.compiled import keeps_code
    from qhub_cpu.processor import features, level, missing

    lacking = missing()
    if lacking:
        message = f"a processor with {lacking} is needed, which this is not: quantized layers run on the slow reference"
        return [Finding("note", _SUBJECT, message)]
    found = [Finding("ok", _SUBJECT, f"numba {version('numba')}, {level()}; {_threads()}")]
    if not {"avx512f", "avx2"} & features():
        message = (
            "this processor has no instruction for table lookups that qhub-cpu knows: 4-bit codes take a slower way"
        )
        found.append(Finding("note", _SUBJECT, message))
    if not keeps_code():
        message = "there is no folder where compiled code can be kept: it is compiled anew in each process, for seconds"
        found.append(Finding("note", _SUBJECT, message, "set NUMBA_CACHE_DIR to a folder that can be written"))
    return found


def _threads() -> str:
    import torch

    from qhub_cpu.threads import openmp

    kind = "torch's own OpenMP threads" if openmp() is not None else "Python threads, because torch's are not OpenMP's"
    return f"{torch.get_num_threads()} of {kind}"
