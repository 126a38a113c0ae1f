"""What an optimized model keeps between calls of ``generate``: joined projections, decode steps, and who was told why
not."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qhub.decoding import refusals
from qhub.decoding.calling import Run
from qhub.decoding.graphs import GraphStep, StepError
from qhub.decoding.joining import Joined
from qhub.decoding.layers import Forms, in_form
from qhub.decoding.loop import Generated, generate_greedily, generate_rows, is_greedy, may_lag
from qhub.decoding.prompts import prompt_forms
from qhub.decoding.recipes import JoinedLayers, projections
from qhub.decoding.steps import MOST_ENDS, StaticStep
from qhub.decoding.survey import Survey, survey
from qhub.integrations.transformers.experts import choose_experts
from qhub.kernels import arranging

__all__ = ["Decoder"]

logger = logging.getLogger("qhub")

# Lengths of a cache: few of them, so that a step serves many calls.
_ROUND = 256
# Steps that are kept; each holds a cache of its size.
_KEPT = 2
# Positions that a cache has room for beyond the prompt before anything was generated; it doubles when it is full.
_AHEAD = 4096
# New tokens for which a step is not worth setting up.
_FEW = 8


class Decoder:
    """Decodes one model in static steps. ``lazily``: only calls that make up for setting up a step."""

    def __init__(self, model: nn.Module, lazily: bool = False):
        self.model, self.lazily = model, lazily
        # By batch, capacity, and dimensions of the position ids (0: the model takes none).
        self.steps: OrderedDict[tuple[int, int, int], StaticStep] = OrderedDict()
        self.joined: dict[nn.Module, JoinedLayers] = {}
        self.mark: int | None = None
        self.pool: Any = None
        # Forms to read prompts with; known once there was a step.
        self.prompt: Forms | None = None
        self.told: set[str] = set()
        self.unable: str | None = None
        # Held by the call that runs: its buffers serve one at a time.
        self.free = threading.Lock()

    # -- what is kept ------------------------------------------------------------------------------------------------

    def prepare(self, seen: Survey | None = None) -> None:
        """Arrange weights and join projections once, and again after weights or modules were replaced.

        ``seen``: the model as it is now; None looks.
        """
        if self.mark is not None and self.mark == (seen or survey(self.model)).mark:
            return
        self.steps.clear()
        self.joined.clear()
        self.unable = self.prompt = None
        _arrange(self.model)
        for module in self.model.modules():
            for layers in projections(module):
                product = Joined.of(layers)  # type: ignore[arg-type]
                if product is not None:
                    self.joined[layers[0]] = JoinedLayers(layers, product)
        self.mark = survey(self.model).mark

    def say(self, reason: str) -> None:
        """Tell once why transformers' own loop runs."""
        if reason not in self.told:
            self.told.add(reason)
            logger.info("qhub: generate runs through transformers' own loop: %s", reason)

    # -- one call ----------------------------------------------------------------------------------------------------

    def refusal(self, ids: Tensor, config: Any, criteria: Any, arguments: dict[str, Any], synced: bool) -> str | None:
        """Return why this call takes transformers' loop; None when the model is ready for :meth:`sample`."""
        seen = survey(self.model)
        if self.unable is not None and self.mark == seen.mark:
            return self.unable
        reason = refusals.of_model(self.model, seen.devices)
        reason = reason or refusals.of_call(self.model, seen.patched, ids, config, arguments, synced)
        if reason is not None:
            return reason
        if criteria.max_length is None:
            return "no length is given at which it ends"
        if self.lazily and not self.steps and criteria.max_length - ids.shape[1] < _FEW:
            return f"fewer than {_FEW} tokens are asked for"
        self.prepare(seen)
        return None

    def sample(
        self, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, arguments: dict[str, Any]
    ) -> tuple[Generated, Any]:
        """Generate from the prompt ``ids``; return what came out and the cache it ended with."""
        model: Any = self.model
        with torch.no_grad():
            with in_form(self.prompt or {}):
                outputs = model._prefill(ids, config, arguments, is_first_iteration=True)
            cache = outputs.past_key_values
            first = outputs.logits[:, -1]
            del outputs
            length = cache.get_seq_length()
            run = Run(self, cache, ids, length, criteria.max_length, arguments, config)
            with ExitStack() as stack:
                stack.enter_context(model._optimize_model_for_decode())
                done, text, logits, unfinished = None, ids, first, None
                if is_greedy(processors, criteria, config, streamer, MOST_ENDS):
                    try:
                        done = generate_greedily(ids, first, run.start, criteria, config)
                    except StepError as error:
                        run.give_up(error)
                        if run.length > length:
                            done = run.ended(ids)
                            if done is None:
                                text, logits, unfinished = run.resume(ids)
                if done is None:
                    lag = 1 if may_lag(processors, criteria, ids.device) else 0
                    rest = (run, processors, criteria, config, streamer, lag, unfinished)
                    done = generate_rows(text, logits, *rest)
            # The last token was never fed.
            run.finish(length + done.ids.shape[1] - ids.shape[1] - 1)
        return done, cache

    def step(self, source: Any, batch: int, length: int, needed: int, greedy: bool, run: Run) -> StaticStep:
        """Return a step with room for ``needed`` positions, a kept one if there is one.

        Raises :class:`StepError` where it cannot be had.
        """
        wanted = min(needed, max(2 * length, length + _AHEAD))
        capacity = -(-wanted // _ROUND) * _ROUND
        positions = 0 if run.position_ids is None else run.position_ids.ndim
        for key, step in self.steps.items():
            if key[0] == batch and key[2] == positions and capacity <= key[1] <= 4 * capacity:
                self.steps.move_to_end(key)
                step.ready(greedy)
                return step
        while len(self.steps) >= _KEPT:
            self.steps.popitem(last=False)
        arguments = (self.model, source, batch, capacity, run.position_ids, self.joined, run.extra)
        try:
            if source.layers[0].keys.is_cuda:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                step = GraphStep(*arguments, pool=self.pool)
            else:
                step = StaticStep(*arguments)
            step.fuse()
            step.ready(greedy)
        except torch.OutOfMemoryError:
            raise StepError(f"there is no memory for a cache of {capacity} positions beside the prompt's") from None
        except StepError:
            raise
        except Exception as error:
            # Code of the model's that does not know this cache may raise anything; its own loop still works.
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise StepError(f"its step does not run on a static cache ({reason})") from error
        self.steps[batch, capacity, positions] = step
        if self.prompt is None and step.forms:
            self.prompt = prompt_forms(self.model, step.forms)
        return step


def _arrange(model: nn.Module) -> None:
    """Bring the weights into the order that kernels read fastest, and experts to the forward that reads it."""
    if arranging.wanted() and arranging.arrange(model):
        choose_experts(model)
