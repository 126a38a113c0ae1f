"""Times callables on a GPU: CUDA-graph replays that rotate over copies of the weights, interleaved in random order.

A replay holds at least a millisecond of back-to-back calls, so that no Python and no launch is in the figure. Call i
uses copy i of the weights: with 300 MB of them in all, none is found in the L2 cache (50 MB on an H100). Contestants
take turns in a new random order each round, because a large product's speed depends on what the card did just before.
Needs torch alone, so that it can be taken into any job.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ROTATED_BYTES", "Replay", "bench", "capture", "copies_for", "replay_times"]

# What the copies of one contestant's weight take together: six times the L2 cache of an H100.
ROTATED_BYTES = 300e6
# How long the card idles before a replay of the "rested" regime, in seconds.
_REST = 0.008

Call = Callable[[int], Tensor]


@dataclass
class Replay:
    """Is a captured graph. ``calls``: how many calls one replay makes."""

    graph: torch.cuda.CUDAGraph
    calls: int


def copies_for(nbytes: float, most: int = 40) -> int:
    """Return how many copies of a weight of ``nbytes`` to rotate over: those that make 300 MB, 2 to ``most``."""
    return max(2, min(most, math.ceil(ROTATED_BYTES / max(nbytes, 1.0))))


def capture(call: Call, copies: int, ms: float = 1.0, warmup: int = 3) -> Replay:
    """Return a graph of at least ``ms`` milliseconds of calls ``call(i)``, i running over ``copies`` weights.

    The first calls, each copy's too, are made eagerly (compilation, tuning, workspaces, what is looked at once for each
    weight); two quick replays say how many calls are needed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for index in range(max(warmup, copies)):
            call(index % copies)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    probe = _graph(call, copies, min(2 * copies, 16))
    probe.graph.replay()
    took = min(_timed(probe) for _ in range(2))
    return _graph(call, copies, max(math.ceil(ms * 1000.0 / took), 2))


def _graph(call: Call, copies: int, calls: int) -> Replay:
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for index in range(calls):
            call(index % copies)
    return Replay(graph, calls)


def _timed(replay: Replay) -> float:
    """Return the microseconds per call of one replay on its own."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    replay.graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1000.0 / replay.calls


def replay_times(
    replays: Mapping[str, Replay], rounds: int = 7, rested: bool = False, seed: int = 0
) -> dict[str, list[float]]:
    """Return {name: microseconds per call, one figure a round}; the order is drawn anew for each round.

    ``rested``: the card idles 8 ms before each replay. Otherwise replays follow each other without a pause, and the
    host waits once a round.
    """
    shuffle = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in replays}
    names = list(replays)
    for replay in replays.values():
        replay.graph.replay()
    torch.cuda.synchronize()
    for _ in range(rounds):
        shuffle.shuffle(names)
        events = []
        for name in names:
            if rested:
                torch.cuda.synchronize()
                time.sleep(_REST)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replays[name].graph.replay()
            stop.record()
            events.append((name, start, stop))
        torch.cuda.synchronize()
        for name, start, stop in events:
            times[name].append(start.elapsed_time(stop) * 1000.0 / replays[name].calls)
    return times


def bench(
    callables: Mapping[str, Call],
    copies: int | Mapping[str, int],
    ms: float = 1.0,
    rounds: int = 7,
    rested: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Return {name: median microseconds per call} of ``callables``, each called as ``call(i)`` with i < ``copies``.

    ``call(i)`` computes with copy i of the weight and must neither synchronize nor read back. ``copies``: for all, or
    by name; :func:`copies_for` says how many a weight needs.
    """
    replays = {
        name: capture(call, copies if isinstance(copies, int) else copies[name], ms) for name, call in callables.items()
    }
    times = replay_times(replays, rounds, rested, seed)
    for replay in replays.values():
        replay.graph.reset()
    return {name: statistics.median(values) for name, values in times.items()}
