"""What a result must say of the machine: GPU, driver, clocks as read, versions; and its measured ceilings."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import bench

__all__ = ["ceilings", "describe"]

_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "gemlite", "gptqmodel", "hqq", "qhub-core")
_FIELDS = "name,driver_version,power.limit,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu"


def _clocks() -> dict[str, str]:
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return {"unread": str(error)}
    return dict(zip(_FIELDS.split(","), told.stdout.splitlines()[0].split(", "), strict=False))


def _start() -> str:
    """Return what differs between starts of a machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip()[:8] if boot.exists() else "unknown"


def describe() -> dict[str, Any]:
    """Return hardware, driver, clocks and versions."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name, "sms": properties.multi_processor_count, "l2_mb": properties.L2_cache_size >> 20,
        "memory_gb": round(properties.total_memory / 2**30, 1), "read": _clocks(), "start": _start(),
        "cuda": torch.version.cuda, "python": platform.python_version(), "versions": versions,
    }  # fmt: skip


def ceilings(when: str) -> dict[str, Any]:
    """Return the copy bandwidth in GB/s (2 GiB read plus as many written) and the bf16 rate in TFLOP/s."""
    count = 2**30
    source = torch.randn(count // 4, device="cuda").to(torch.bfloat16).repeat(4)
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    moves = {"copy": lambda i: target.copy_(source), "kernel": lambda i: torch.neg(source, out=target)}
    # The card's copy engine may be slower than a kernel that reads and writes.
    copy = min(bench(moves, 1).values())
    product = bench({"product": lambda i: a @ b}, 1, ms=4.0)["product"]
    return {
        "when": when, "copy_gbs": round(4 * count / copy / 1e3, 1),
        "bf16_tflops": round(2 * 8192**3 / product / 1e6, 1), "read": _clocks(),
    }  # fmt: skip
