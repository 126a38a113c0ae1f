"""Marlin, ExLlamaV2 and Machete as built by build.py, called through their C interfaces.

The libraries are looked for in the folder that QHUB_BENCH_NATIVE names. How weights are ordered follows gptqmodel's
``utils/marlin.py``, ``nn_modules/qlinear/exllamav2.py`` and ``utils/machete.py``; which schedule Machete takes,
``machete/generate.py``.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.case import GROUP, Case, Contestant, Prepared, copies_of

__all__ = ["CONTESTANTS", "machete_schedule"]


@cache
def library(name: str) -> ctypes.CDLL:
    """Load ``lib{name}.so``; raises FileNotFoundError with what to do."""
    folder = os.environ.get("QHUB_BENCH_NATIVE")
    path = Path(folder or "") / f"lib{name}.so"
    if not folder or not path.exists():
        raise FileNotFoundError(
            f"no lib{name}.so: build it with benchmarks/gpu/build.py, name its folder in QHUB_BENCH_NATIVE"
        )
    return ctypes.CDLL(str(path.resolve()))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _done(status: int, name: str) -> None:
    if status:
        raise RuntimeError(f"{name} returned {status}")


def words_along_k(q: Tensor) -> Tensor:
    """Return codes ``q`` (N, K) as words (K / 8, N) int32, eight neighbours along K in one, the first lowest (GPTQ)."""
    n, k = q.shape
    words = torch.zeros(k // 8, n, dtype=torch.int32, device=q.device)
    columns = q.t().reshape(k // 8, 8, n)
    for index in range(8):
        words |= columns[:, index].to(torch.int32) << (4 * index)
    return words


def _marlin(case: Case) -> Prepared:
    lib = library("marlin")
    q, scales = case.int4
    n, k = case.n, case.k
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    words = words_along_k(q)
    packed = torch.empty(k // 16, n * 2, dtype=torch.int32, device=q.device)
    shared = 227 * 1024
    _done(lib.marlin_repack(_pointer(words), _pointer(packed), k, n, sms, shared, _stream()), "marlin_repack")
    order = torch.tensor([i + 8 * j for i in range(8) for j in range(8)], device=q.device)
    permuted = scales.t().to(torch.bfloat16).reshape(-1, 64)[:, order].reshape(-1, n).contiguous()
    workspace = torch.zeros(max(sms, 128), dtype=torch.int32, device=q.device)
    scratch = torch.empty(sms * 64 * 256, dtype=torch.float32, device=q.device)
    nbytes = packed.nbytes + permuted.nbytes
    copies = copies_of(nbytes, lambda: (packed.clone(), permuted.clone()))

    def call(x: Tensor, i: int) -> Tensor:
        y = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
        own, own_scales = copies[i]
        status = lib.marlin_mm(
            _pointer(x), _pointer(own), _pointer(y), _pointer(scratch), _pointer(own_scales), _pointer(workspace),
            x.shape[0], n, k, GROUP, sms, _stream(),
        )  # fmt: skip
        _done(status, "marlin_mm")
        return y

    return Prepared(call, len(copies), nbytes, lambda: case.dense_of(q, scales, 8.0))


def _exllamav2(case: Case) -> Prepared:
    lib = library("exllamav2")
    lib.exllamav2_matrix.restype = ctypes.c_void_p
    q, _ = case.int4
    # Its scales are fp16; those of the others, rounded to bf16, are the nearest of its own.
    scales = case.int4[1].to(torch.float16).float()
    n, k = case.n, case.k
    words = words_along_k(q)
    # Zeros, eight to a word; all are 8.
    zeros = torch.full((k // GROUP, n // 8), 0x88888888 - (1 << 32), dtype=torch.int32, device=q.device)
    halves = scales.t().to(torch.float16).contiguous()
    temp = torch.empty(k * n + 64, dtype=torch.float16, device=q.device)
    nbytes = words.nbytes + zeros.nbytes + halves.nbytes

    def make() -> tuple[Tensor, Tensor, Tensor, ctypes.c_void_p]:
        own = (words.clone(), zeros.clone(), halves.clone())
        matrix = lib.exllamav2_matrix(*map(_pointer, own), _pointer(temp), k, n, k // GROUP)
        return (*own, ctypes.c_void_p(matrix))

    torch.cuda.synchronize()
    copies = copies_of(nbytes, make)
    dense = temp[: k * n].view(k, n)

    def call(x: Tensor, i: int) -> Tensor:
        m = x.shape[0]
        if m > 50:
            _done(lib.exllamav2_dequantize(copies[i][3], _pointer(dense), _stream()), "exllamav2_dequantize")
            return torch.mm(x, dense)
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        _done(lib.exllamav2_mm(_pointer(x), copies[i][3], _pointer(y), m, n, k, _stream()), "exllamav2_mm")
        return y

    return Prepared(call, len(copies), nbytes, lambda: case.dense_of(q, scales, 8.0))


def machete_schedule(m: int, n: int, k: int) -> str:
    """Return the schedule that Machete's heuristic for H100 takes, as "tile of N x tile of M"."""
    rules = (
        (256, ((k <= 16384 and n <= 4096, "128x128"), (True, "128x256"))),
        (128, ((k <= 4096 and n <= 4096, "128x64"), (k <= 8192 and n <= 8192, "128x128"), (True, "128x256"))),
        (
            64,
            (
                (k <= 4069 and n <= 4069, "128x32"),
                (k <= 4069 and n <= 8192, "128x64"),
                (k >= 8192 and n >= 12288, "256x128"),
                (True, "128x128"),
            ),
        ),
        (32, ((k <= 6144 and n <= 6144, "128x16"), (k >= 16384 and n >= 12288, "256x64"), (True, "128x64"))),
        (16, ((k <= 12288 and n <= 8192, "128x32"), (True, "256x32"))),
        (0, ((n >= 26624, "256x16"), (True, "128x16"))),
    )
    for above, choices in rules:
        if m > above:
            return next(name for holds, name in choices if holds)
    raise ValueError(f"no schedule for {m} rows")


def _machete(case: Case) -> Prepared:
    lib = library("machete")
    q, scales = case.int4
    n, k = case.n, case.k
    words = words_along_k(q).t().contiguous()
    packed = torch.empty_like(words)
    _done(lib.machete_prepack(_pointer(words), _pointer(packed), n, k, _stream()), "machete_prepack")
    rows = scales.t().to(torch.bfloat16).contiguous()
    nbytes = packed.nbytes + rows.nbytes
    copies = copies_of(nbytes, lambda: (packed.clone(), rows.clone()))

    def call(x: Tensor, i: int) -> Tensor:
        m = x.shape[0]
        name = machete_schedule(m, n, k).replace("x", "_")
        needed = getattr(lib, f"machete_workspace_{name}")
        needed.restype = ctypes.c_int64
        workspace = torch.empty(max(needed(m, n, k, GROUP), 1), dtype=torch.uint8, device=x.device)
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        own, own_scales = copies[i]
        status = getattr(lib, f"machete_mm_{name}")(
            _pointer(x),
            _pointer(own),
            _pointer(y),
            _pointer(own_scales),
            _pointer(workspace),
            m,
            n,
            k,
            GROUP,
            _stream(),
        )
        _done(status, "machete_mm")
        return y

    return Prepared(call, len(copies), nbytes, lambda: case.dense_of(q, scales, 8.0))


CONTESTANTS = [
    Contestant("marlin_bf16", "int4", _marlin, note="gptqmodel 7.7.0's source"),
    Contestant("exllamav2_fp16", "int4", _exllamav2, dtype=torch.float16, note="gptqmodel 7.7.0's source"),
    Contestant("machete_bf16", "int4", _machete, note="gptqmodel 7.7.0's source, CUTLASS 4.2.0, its own heuristic"),
]
