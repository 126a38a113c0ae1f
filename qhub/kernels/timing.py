"""Times contestants against each other: in random order, each over copies of the weight that no cache holds.

On a GPU a CUDA graph of calls is replayed, so that neither Python nor launching is in the times; elsewhere calls are
timed from outside. Method: medians over rounds, a null control (one contestant entered twice) beside them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from qhub.kernels.hardware import Card, card_name

__all__ = ["copies_for", "measure", "measured_card"]

Call = Callable[[], Any]

_ROUNDS = 7
# Seconds that one measurement lasts at least, and calls in it at most.
_LENGTH, _CALLS = {"cuda": 1e-3}, 256
_LENGTH_ELSEWHERE = 4e-3
# A contestant that needs so many times the time of the fastest is not measured again.
_HOPELESS = 8.0
# Copies of a weight take so many times the last cache, so that none is left there when its turn comes.
_CACHES, _CACHE_UNKNOWN, _MOST_COPIES = 4, 32 << 20, 64


def copies_for(device: torch.device, size: int) -> int:
    """Return how many copies of a weight of ``size`` bytes to rotate over."""
    cache = _CACHE_UNKNOWN
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _CACHE_UNKNOWN
    wanted = min(_MOST_COPIES, -(-_CACHES * cache // max(1, size)))
    return max(1, min(wanted, _room(device) // (2 * max(1, size))))


def measure(contestants: Mapping[str, Sequence[Call]], device: torch.device, rounds: int = _ROUNDS) -> dict[str, float]:
    """Return the median seconds of one call of each contestant.

    ``contestants``: {name: calls}, one for each copy of the weight; all have run before. One that is hopelessly slow is
    timed by its first calls alone.
    """
    first = {name: _burst(calls, device) for name, calls in contestants.items()}
    # What a host needs to start a kernel hides how fast a short one is.
    least = max(min(first.values()), 5e-5)
    racing = {name: calls for name, calls in contestants.items() if first[name] <= _HOPELESS * least}
    replays = {name: _replay(calls, first[name], device) for name, calls in racing.items()}
    seen: dict[str, list[float]] = {name: [] for name in racing}
    order = list(racing)
    shuffle = random.Random(0).shuffle
    for turn in range(rounds + 1):
        shuffle(order)
        for name in order:
            seconds = replays[name]()
            # The first turn warms up.
            if turn:
                seen[name].append(seconds)
    return {**first, **{name: statistics.median(times) for name, times in seen.items()}}


def _burst(calls: Sequence[Call], device: torch.device) -> float:
    """Return the seconds of one call, host included: enough to know how many fill a measurement."""
    least = float("inf")
    for _ in range(2):
        _wait(device)
        start = time.perf_counter()
        some = calls[: 4 if device.type == "cuda" else 1]
        for call in some:
            call()
        _wait(device)
        least = min(least, (time.perf_counter() - start) / len(some))
    return least


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
