"""Builds Marlin, ExLlamaV2 and Machete from gptqmodel's own sources into libraries with a C interface, with nvcc alone.

    python benchmarks/gpu/build.py GPTQMODEL/gptqmodel_ext OUT [--cutlass CUTLASS] [--only marlin,exllamav2,machete]

GPTQMODEL: the unpacked source package (7.7.0: ``pip download --no-deps --no-binary :all: gptqmodel==7.7.0``). CUTLASS:
a source folder with ``include`` (Machete needs it). Only what the benchmark times is compiled: bf16 (ExLlamaV2: fp16),
symmetric 4-bit weights, groups of 128. Nothing of those sources is kept in this repository.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NATIVE = Path(__file__).resolve().parent / "native"
COMMON = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-Xcompiler", "-fPIC", "-w"]

# (thread_k, thread_n, threads) of Marlin's kernels for few rows and for many, as its table has them, in blocks of 16.
_MARLIN_FEW = ((8, 8, 256), (8, 4, 128), (4, 8, 128))
_MARLIN_MANY = ((16, 4, 256), (8, 4, 128), (4, 8, 128))
# (tile of N, tile of M, cluster): the schedules that Machete's heuristic picks for the benchmark's shapes.
MACHETE = (
    (128, 16, 1), (256, 16, 1), (128, 32, 2), (256, 32, 2), (128, 64, 2), (128, 128, 2), (256, 128, 2), (128, 256, 2),
)  # fmt: skip


def compile_all(jobs: list[tuple[list[str], Path]], processes: int) -> None:
    """Run nvcc for each (arguments, object file), ``processes`` at once; what is newer than its source is kept."""

    def one(job: tuple[list[str], Path]) -> None:
        arguments, target = job
        if target.exists():
            return
        partial = target.with_suffix(".partial.o")
        subprocess.run(["nvcc", *COMMON, *arguments, "-c", "-o", str(partial)], check=True)
        partial.rename(target)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, jobs))


def link(objects: list[Path], out: Path) -> None:
    """Link ``objects`` to the shared library ``out``, the CUDA runtime inside."""
    subprocess.run(["nvcc", "-shared", "-o", str(out), *map(str, objects), "-cudart", "static"], check=True)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def _marlin_kernels() -> list[str]:
    """Return the instances for groups of 128 (8 blocks of 16), as gptqmodel's generator writes them."""
    few = [(1, n, k, threads, small) for small in ("true", "false") for n, k, threads in _MARLIN_FEW]
    many = [(m, n, k, threads, "false") for m in (2, 3, 4) for n, k, threads in _MARLIN_MANY]
    return [
        "template __global__ void Marlin<nv_bfloat16, vllm::kU4B8.id(), vllm::kBFloat16.id(), "
        f"{threads}, {m}, {n}, {k}, {small}, pipe_stages, 8, false>( MARLIN_KERNEL_PARAMS );"
        for m, n, k, threads, small in few + many
    ]


def marlin(source: Path, out: Path, work: Path, processes: int) -> None:
    """Build ``libmarlin.so``."""
    folder = source / "marlin"
    host = (folder / "gptq_marlin.cu").read_text()
    host = host[host.index('#include "kernel.h"') :]
    host = host[: host.index("torch::Tensor MARLIN_GEMM_EXPORT_NAME", host.index("#else"))]
    # The branch for old architectures and the #else before the real one go; of the table, one weight type stays.
    start = host.index("#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750")
    host = host[:start] + host[host.index("#else", start) + len("#else") :]
    rows = "".join(
        f"#undef COMMON_GET_IF_{name}\n#define COMMON_GET_IF_{name}(W_TYPE, N_BLOCKS, K_BLOCKS, NUM_THREADS, STAGES) "
        + " ".join(
            f"_GET_IF(W_TYPE, {m}, N_BLOCKS, K_BLOCKS, {small}, STAGES, 8, NUM_THREADS, false)" for m, small in of
        )
        + "\n"
        for name, of in (
            ("M1", [(1, "true"), (1, "false")]),
            ("M234", [(2, "false"), (3, "false"), (4, "false")]),
        )
    )
    table = host.index("template <typename scalar_t>\nMarlinFuncPtr get_marlin_kernel")
    body = host[table:]
    end = body.index("  return kernel;")
    kept = "  if (stages == pipe_stages) {\n    if (false) {\n    }\n    COMMON_GET_IF(vllm::kU4B8, pipe_stages)\n  }\n"
    head = body[: body.index("  if constexpr")]
    host = host[:table] + rows + head + kept + body[end:]
    (work / "marlin_host.inc").write_text(host)
    repack = (folder / "gptq_marlin_repack.cu").read_text()
    repack = repack[repack.index('#include "marlin.cuh"') : repack.index("#define CALL_IF")]
    (work / "marlin_repack.inc").write_text(repack)
    includes = [f"-I{NATIVE / 'shim'}", f"-I{work}", f"-I{folder}"]
    flags = ["-arch=sm_90", "-static-global-template-stub=false", *includes]
    jobs = [([*flags, str(NATIVE / "marlin.cu")], work / "marlin.o")]
    for index, line in enumerate(_marlin_kernels()):
        unit = work / f"marlin_kernel_{index}.cu"
        unit.write_text(
            '#include "shim.h"\n#include "kernel.h"\n#include "marlin_template.h"\n'
            f"namespace MARLIN_NAMESPACE_NAME {{\n{line}\n}}\n"
        )
        jobs.append(([*flags, str(unit)], unit.with_suffix(".o")))
    compile_all(jobs, processes)
    link([target for _, target in jobs], out / "libmarlin.so")


def exllamav2(source: Path, out: Path, work: Path, processes: int) -> None:
    """Build ``libexllamav2.so``."""
    folder = source / "exllamav2" / "cuda"
    for name in ("q_matrix", "q_gemm"):
        text = (folder / f"{name}.cu").read_text()
        text = re.sub(r"<<<gridDim, blockDim>>>", "<<<gridDim, blockDim, 0, current_stream>>>", text)
        if name == "q_gemm":
            # What decides between the kernels and cuBLAS is the caller's here.
            first = text.index("void gemm_half_q_half_cuda\n")
            text = text[:first].replace('#include "util.cuh"', "")  # it has no guard, and q_matrix has it
            text = text.replace('#include "../config.h"', f'#include "{folder.parent / "config.h"}"')
        (work / f"exllamav2_{name}.inc").write_text(text)
    flags = ["-arch=sm_90", f"-I{NATIVE / 'shim'}", f"-I{work}", f"-I{folder}", str(NATIVE / "exllamav2.cu")]
    compile_all([(flags, work / "exllamav2.o")], processes)
    link([work / "exllamav2.o"], out / "libexllamav2.so")


def machete(source: Path, out: Path, work: Path, processes: int, cutlass: Path) -> None:
    """Build ``libmachete.so``."""
    includes = [
        NATIVE / "shim",
        source / "machete",
        source,
        cutlass / "include",
        cutlass / "tools" / "util" / "include",
    ]
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-DNDEBUG", "-DCUTLASS_ENABLE_TENSOR_CORE_MMA=1"]
    flags += [f"-I{path}" for path in includes] + ["-lcuda"]
    unit = str(NATIVE / "machete.cu")
    jobs = [([*flags, "-DPREPACK", unit], work / "machete_prepack.o")]
    for n, m, cluster in MACHETE:
        name = f"{n}x{m}"
        own = [f"-DSCHEDULE={name.replace('x', '_')}", f"-DTILE_N={n}", f"-DTILE_M={m}", f"-DCLUSTER={cluster}"]
        jobs.append(([*flags, *own, unit], work / f"machete_{name}.o"))
    compile_all(jobs, processes)
    link([target for _, target in jobs], out / "libmachete.so")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cutlass", type=Path)
    parser.add_argument("--only", default="marlin,exllamav2,machete")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="where objects are kept between calls; OUT/work if left out")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        parser.error("nvcc is not on PATH: these peers are CUDA C++")
    arguments.out.mkdir(parents=True, exist_ok=True)
    work = arguments.work or arguments.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    wanted = arguments.only.split(",")
    shared = (arguments.source, arguments.out, work, arguments.processes)
    if "marlin" in wanted:
        marlin(*shared)
    if "exllamav2" in wanted:
        exllamav2(*shared)
    if "machete" in wanted:
        if arguments.cutlass is None:
            parser.error("Machete needs --cutlass")
        machete(*shared, arguments.cutlass)


if __name__ == "__main__":
    main()
