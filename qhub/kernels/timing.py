"""Times contestants against each other: in random order, each over copies of the weight that no cache holds.

On a GPU a CUDA graph of calls is replayed, so that neither Python nor launching is in the times; elsewhere calls are
timed from outside. Method: medians over rounds, a null control (one contestant entered twice) beside them.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qhub.kernels.hardware import Card, card_name

__all__ = ["Contestant", "copies_for", "measure", "measured_card"]

Call = Callable[[], Any]

_ROUNDS = 7
# Seconds that one measurement lasts at least, and calls in it at most.
_LENGTH, _CALLS = {"cuda": 1e-3}, 256
# Copies of the weight that the first calls go to, and variants of a kernel that go on from there.
_FEW, _FINALISTS = 6, 4
_LENGTH_ELSEWHERE = 4e-3
# A contestant that needs so many times the time of the fastest is not measured again.
_HOPELESS = 8.0
# Below so many seconds nothing is: what was first seen of it may be chance.
_SHORT = 5e-5
# What takes so many seconds is tried once.
_LONG = 0.3
# Copies of a weight take so many times the last cache, so that none is left there when its turn comes.
_CACHES, _CACHE_UNKNOWN, _MOST_COPIES = 4, 32 << 20, 64


def copies_for(device: torch.device, size: int) -> int:
    """Return how many copies of a weight of ``size`` bytes to rotate over."""
    cache = _CACHE_UNKNOWN
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _CACHE_UNKNOWN
    wanted = min(_MOST_COPIES, -(-_CACHES * cache // max(1, size)))
    return max(1, min(wanted, _room(device) // (2 * max(1, size))))


@dataclass(frozen=True)
class Contestant:
    """Is one way to compute. ``calls(count)`` returns calls on so many copies of the weight, each of which has run.
    ``variant_of``: whose other configuration it is; None: it is measured whatever its first calls say."""

    calls: Callable[[int], Sequence[Call]]
    variant_of: str | None = None


def measure(
    contestants: Mapping[str, Contestant], device: torch.device, copies: int, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Return the median seconds of one call of each contestant; ``copies``: of the weight to rotate over.

    First each runs a few times. One that is hopelessly slow, or that a graph cannot hold because it waits for the
    device, keeps that time; of a kernel's variants only the best few race, the others are left out.
    """
    tried = {name: _burst(one.calls(min(copies, _FEW)), device) for name, one in contestants.items()}
    first = {name: seconds for name, (seconds, _) in tried.items()}
    limit = max(_HOPELESS * min(first.values()), _SHORT)
    racing = [name for name, (seconds, repeatable) in tried.items() if repeatable and seconds <= limit]
    for kernel in {one.variant_of for one in contestants.values() if one.variant_of is not None}:
        variants = sorted((first[name], name) for name, one in contestants.items() if one.variant_of == kernel)
        out = {name for _, name in variants[_FINALISTS:]}
        racing = [name for name in racing if name not in out]
        first = {name: seconds for name, seconds in first.items() if name not in out}
    replays = {name: _replay(contestants[name].calls(copies), first[name], device) for name in racing}
    seen: dict[str, list[float]] = {name: [] for name in racing}
    shuffle = random.Random(0).shuffle
    for turn in range(rounds + 1):
        shuffle(racing)
        for name in racing:
            seconds = replays[name]()
            # The first turn warms up.
            if turn:
                seen[name].append(seconds)
    return {**first, **{name: statistics.median(times) for name, times in seen.items()}}


def _burst(calls: Sequence[Call], device: torch.device) -> tuple[float, bool]:
    """Return the seconds of one call, enough to know how many fill a measurement, and whether it can be replayed."""
    some = calls if device.type == "cuda" else calls[:1]
    if device.type == "cuda" and not _waits(some[0], device):
        timed = _graph(list(some), device)
        timed()
        return timed(), True
    least = float("inf")
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        for call in some:
            call()
        _wait(device)
        least = min(least, (time.perf_counter() - start) / len(some))
        if least > _LONG:
            break
    return least, device.type != "cuda"


def _waits(call: Call, device: torch.device) -> bool:
    """Return whether the call waits for the device: found out before a capture, which it would break."""
    _wait(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # That the mode is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return False


def _replay(calls: Sequence[Call], guess: float, device: torch.device) -> Callable[[], float]:
    """Return a function that measures the seconds of one call."""
    wanted = max(1, round(_LENGTH.get(device.type, _LENGTH_ELSEWHERE) / guess))
    count = min(_CALLS, max(wanted, len(calls) if device.type == "cuda" else 1))
    turns = [calls[i % len(calls)] for i in range(count)]
    if device.type == "cuda":
        return _graph(turns, device)
    position = 0

    def timed() -> float:
        # Goes on where the last measurement ended, so that few calls rotate too.
        nonlocal position
        some = [calls[(position + i) % len(calls)] for i in range(count)]
        position += count
        _wait(device)
        start = time.perf_counter()
        for call in some:
            call()
        _wait(device)
        return (time.perf_counter() - start) / count

    return timed


def _graph(turns: list[Call], device: torch.device) -> Callable[[], float]:
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            turns[0]()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for turn in turns:
                turn()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed() -> float:
        with torch.cuda.device(device):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(turns)

    return timed


def measured_card(device: torch.device) -> Card:
    """Return what ``device`` reaches: the rate of a large copy, and of large products in each kind of number."""
    big = device.type == "cuda"
    pair = torch.ones(2, (1 << 29) if big else (1 << 26), dtype=torch.uint8, device=device)
    bandwidth = pair.numel() / _fastest(lambda: pair[0].copy_(pair[1]), device)
    size = 8192 if big else 768
    rates = {}
    for unit, dtype in (("half", torch.bfloat16), ("vector", torch.float32)):
        # TF32 is the matrix unit's; float32 products of torch do without unless told.
        n = size if unit == "half" else size // 2
        a = torch.randn(n, n, device=device).to(dtype)
        rates[unit] = 2 * n**3 / _fastest(lambda a=a: a @ a, device)  # type: ignore[misc]
    rates["byte"] = 2 * rates["half"]
    if big:
        codes = torch.randint(-127, 127, (size, size), dtype=torch.int8, device=device)
        try:
            rates["byte"] = 2 * size**3 / _fastest(lambda: torch._int_mm(codes, codes.t()), device)
        except RuntimeError:
            # Not on every card; then twice the rate of 16-bit numbers stays.
            rates["byte"] = rates["half"]
    return Card(card_name(device), bandwidth, rates, measured=True)


def _fastest(call: Call, device: torch.device) -> float:
    call()
    times = []
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        for _ in range(4):
            call()
        _wait(device)
        times.append((time.perf_counter() - start) / 4)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize()


def _room(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 1 << 30
