"""What a card can do: its name, and the rates of its memory and of its units, measured or read off its properties."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["Card", "card_name", "nominal"]

# Of the rate that a datasheet says, what large copies and products reach: measured on an H100 80GB HBM3 (3.02 of 3.35
# TB/s, 735 of 989 TFLOP/s).
_SHARE = 0.9, 0.75
# Multiply-adds of 16-bit numbers (counted as two) that the matrix units of one multiprocessor do in a cycle, by compute
# capability: NVIDIA's architecture white papers (V100, A100, GA102, AD102, H100) and data sheets (B200).
_HALF = {(7, 0): 1024, (7, 5): 512, (8, 0): 2048, (8, 6): 512, (8, 7): 1024, (8, 9): 512, (9, 0): 4096, (10, 0): 8192}
_HALF_UNKNOWN = 512
# For devices that say nothing: the order of kernels depends little on it.
_UNKNOWN = {"bandwidth": 500e9, "half": 100e12, "byte": 200e12, "vector": 20e12}


@dataclass(frozen=True)
class Card:
    """Is a device as kernels see it. ``bandwidth`` in bytes a second; ``rates`` in operations a second, by unit:
    ``half``, ``byte``, ``vector`` (see :class:`qhub.kernels.roofline.Cost`). ``measured``: whether tuning found them.
    """

    name: str
    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict, hash=False)
    measured: bool = False

    def rate(self, unit: str, item: int = 2) -> float:
        """Return the rate of ``unit`` for inputs of ``item`` bytes a number: no 16-bit unit takes float32."""
        return self.rates["vector" if unit == "half" and item > 2 else unit]


def card_name(device: torch.device) -> str:
    """Return the name under which measurements on ``device`` are kept."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    module = getattr(torch, device.type, None)
    named = getattr(module, "get_device_name", None)
    return str(named(device)) if named is not None else device.type


def nominal(device: torch.device) -> Card:
    """Return what ``device`` should reach by its properties."""
    name = card_name(device)
    if device.type == "cuda":
        return _gpu(name, torch.cuda.get_device_properties(device))
    if device.type == "cpu":
        # A core's share of memory, and two fused multiply-adds of eight float32 numbers a cycle.
        threads = torch.get_num_threads()
        vector = threads * 3e9 * 32
        return Card(name, 10e9 * min(threads, 8), {"half": vector, "byte": 2 * vector, "vector": vector})
    rates = {unit: rate for unit, rate in _UNKNOWN.items() if unit != "bandwidth"}
    return Card(name, _UNKNOWN["bandwidth"], rates)


def _gpu(name: str, properties: Any) -> Card:
    cores = properties.multi_processor_count
    # In kHz; absent in some builds of torch.
    clock = 1e3 * (getattr(properties, "clock_rate", 0) or 1.7e6)
    memory = 1e3 * getattr(properties, "memory_clock_rate", 0) * 2 * getattr(properties, "memory_bus_width", 0) / 8
    if torch.version.hip is not None:
        # CDNA 3, white paper: 2048 operations a cycle and compute unit; others are taken as half of it.
        half, byte = (2048 if "MI3" in name else 1024), 2
        lanes = 256
    else:
        capability = (properties.major, properties.minor)
        half, byte = _HALF.get(capability, _HALF_UNKNOWN), 2 if capability >= (8, 0) else 1
        lanes = 128 if capability in ((7, 0), (7, 5), (8, 0)) else 256
    share = _SHARE[1] * cores * clock
    rates = {"half": share * half, "byte": share * half * byte, "vector": share * lanes}
    return Card(name, _SHARE[0] * memory or _UNKNOWN["bandwidth"], rates)


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if os.access(info, os.R_OK):
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine() or "cpu"
