"""What the processor offers, as the compiler sees it."""

from __future__ import annotations

import platform

__all__ = ["features", "level", "missing"]


def features() -> frozenset[str]:
    """Return the instruction sets that numba compiles for, by LLVM's names."""
    from numba.core.registry import cpu_target

    listed = cpu_target.target_context.codegen().magic_tuple()[2]
    return frozenset(name[1:] for name in listed.split(",") if name.startswith("+"))


def level() -> str:
    """Return the set that table lookups use."""
    found = features()
    return next(
        (name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in found), "no lookup instruction"
    )


def missing() -> str | None:
    """Return what the compiled code cannot do without and this processor lacks; None when it lacks nothing.

    Elsewhere float16 would become calls into a library that is not linked, and LLVM ends the process over such a call.
    """
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return None
    if machine not in ("x86_64", "amd64"):
        return f"x86-64 or ARM64 instructions, not {machine}"
    return ", ".join(sorted({"avx2", "fma", "f16c"} - features())) or None
