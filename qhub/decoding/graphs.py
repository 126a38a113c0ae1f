"""A decode step captured as a CUDA graph: replaying it is one launch for the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qhub.decoding.steps import StaticStep
from qhub.decoding.trials import agree

__all__ = ["GraphStep", "StepError"]


class StepError(Exception):
    """Says why a model's decode step cannot be run this way; the plain loop is used instead."""


class GraphStep(StaticStep):
    """Is a :class:`StaticStep` whose work is captured once and replayed: the host's part is one launch."""

    def __init__(self, *args: Any, pool: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pool = pool
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def ready(self, greedy: bool) -> None:
        """Capture the step and compare replays at two places with eager runs there.

        Raises :class:`StepError` where the model's step cannot be captured, or a replay gives something else.
        """
        if greedy in self.graphs:
            return
        with torch.cuda.device(self.tokens.device):
            self._capture(greedy)

    def _capture(self, greedy: bool) -> None:
        wanted = []
        places = (self.capacity - 1, self.capacity // 2)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for place in places:
                self.randomize(place)
                wanted.append((super().advance(greedy).clone(), self.tokens.clone()))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves the generator's state in the middle of it: it gets one of its own.
        randomness = torch.cuda.default_generators[torch.cuda.current_device()]
        kept = randomness.graphsafe_get_state()
        randomness.graphsafe_set_state(randomness.clone_state())
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=stream):
                logits = super().advance(greedy)
        except Exception as error:
            torch.cuda.synchronize()
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise StepError(f"its step cannot be captured ({reason})") from None
        finally:
            randomness.graphsafe_set_state(kept)
        for place, (expected, tokens) in zip(places, wanted, strict=True):
            self.randomize(place)
            graph.replay()
            if not agree(logits, expected) or (greedy and not torch.equal(self.tokens, tokens)):
                raise StepError("a replay of its captured step gives something else than running it")
        self.graphs[greedy] = graph, logits

    def advance(self, greedy: bool) -> Tensor:
        if greedy not in self.graphs:
            return super().advance(greedy)
        graph, logits = self.graphs[greedy]
        graph.replay()
        return logits
