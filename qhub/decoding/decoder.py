"""What an optimized model keeps between calls of ``generate``: joined projections, decode steps, and who was told why
not."""

from __future__ import annotations

import importlib
import logging
from collections import OrderedDict
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qhub.decoding import refusals
from qhub.decoding.joining import Joined, pointers
from qhub.decoding.loop import Generated, generate_greedily, generate_rows, is_greedy, may_lag
from qhub.decoding.recipes import JoinedLayers, projections
from qhub.decoding.steps import MOST_ENDS, GraphStep, StaticStep, StepError

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
        self.steps: OrderedDict[tuple[int, int, bool], StaticStep] = OrderedDict()
        self.joined: dict[nn.Module, JoinedLayers] = {}
        self.mark: int | None = None
        self.pool: Any = None
        self.told: set[str] = set()
        self.unable: str | None = None

    # -- what is kept ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Join projections and arrange weights, once, and again after weights or modules were replaced."""
        if self.mark is not None and self.mark == self._fingerprint():
            return
        self.steps.clear()
        self.joined.clear()
        self.unable = None
        for module in self.model.modules():
            for layers in projections(module):
                product = Joined.of(layers)  # type: ignore[arg-type]
                if product is not None:
                    self.joined[layers[0]] = JoinedLayers(layers, product)
        self.mark = self._fingerprint()

    def release(self) -> None:
        """Give back the caches and graphs; the next call builds them anew."""
        self.steps.clear()
        self.mark = None

    def _fingerprint(self) -> int:
        """Return a number that changes when a captured step would no longer do what the model does."""
        seen: list[Any] = []
        for module in self.model.modules():
            seen += [id(module), len(module._forward_hooks), len(module._forward_pre_hooks)]
            seen.append("forward" in module.__dict__)
            for parameter in module._parameters.values():
                if parameter is not None:
                    seen += pointers(parameter)
            if hasattr(module, "merged_adapters"):
                # A tuner layer of PEFT: what its forward decides on the host.
                seen.append(repr([module.active_adapters, module.disable_adapters, module.merged_adapters]))
                seen.append(repr(getattr(module, "scaling", None)))
        return hash(tuple(seen))

    def say(self, reason: str) -> None:
        """Tell once why transformers' own loop runs."""
        if reason not in self.told:
            self.told.add(reason)
            logger.info("qhub: generate runs through transformers' own loop: %s", reason)

    # -- one call ----------------------------------------------------------------------------------------------------

    def refusal(self, ids: Tensor, config: Any, criteria: Any, arguments: dict[str, Any], synced: bool) -> str | None:
        """Return why this call takes transformers' loop."""
        if self.unable is not None:
            return self.unable
        reason = refusals.of_model(self.model) or refusals.of_call(self.model, ids, config, arguments, synced)
        if reason is not None:
            return reason
        if criteria.max_length is None:
            return "no length is given at which it ends"
        return None

    def sample(
        self, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, arguments: dict[str, Any]
    ) -> tuple[Generated, Any]:
        """Generate from the prompt ``ids``; return what came out and the cache it ended with."""
        model: Any = self.model
        with torch.no_grad():
            self.prepare()
            outputs = model._prefill(ids, config, arguments, is_first_iteration=True)
            cache = outputs.past_key_values
            first = outputs.logits[:, -1]
            del outputs
            length = cache.get_seq_length()
            run = _Run(self, cache, ids, length, criteria.max_length, arguments, config)
            with ExitStack() as stack:
                stack.enter_context(model._optimize_model_for_decode())
                done = None
                if is_greedy(processors, criteria, config, streamer, MOST_ENDS):
                    try:
                        done = generate_greedily(ids, first, run.start, criteria, config)
                    except StepError as error:
                        run.give_up(error)
                if done is None:
                    lag = 1 if may_lag(processors, criteria, ids.device) else 0
                    done = generate_rows(ids, first, run, processors, criteria, config, streamer, lag)
            # The last token was never fed.
            run.finish(length + done.ids.shape[1] - ids.shape[1] - 1)
        return done, cache

    def step(self, source: Any, batch: int, length: int, needed: int, greedy: bool, run: _Run) -> StaticStep:
        """Return a step with room for ``needed`` positions, a kept one if there is one.

        Raises :class:`StepError` where it cannot be had.
        """
        wanted = min(needed, max(2 * length, length + _AHEAD))
        capacity = -(-wanted // _ROUND) * _ROUND
        takes_positions = run.position_ids is not None
        for key, step in self.steps.items():
            if key[0] == batch and key[2] == takes_positions and capacity <= key[1] <= 4 * capacity:
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
        self.steps[batch, capacity, takes_positions] = step
        return step


class _Run:
    """Is the state of one call: which step runs, and how far the cache is filled."""

    def __init__(
        self, decoder: Decoder, cache: Any, ids: Tensor, length: int, limit: int, arguments: dict[str, Any], config: Any
    ):
        self.decoder, self.cache, self.length = decoder, cache, length
        self.batch = ids.shape[0]
        self.arguments = arguments
        self.needed = length + limit - ids.shape[1]
        self.position_ids = arguments.get("position_ids")
        self.extra = {k: v for k, v in arguments.items() if k == "logits_to_keep" and v is not None}
        self.mask = arguments.get("attention_mask")
        self.kept = bool(config.return_dict_in_generate) or getattr(cache, "_is_user_defined", False)
        self.step: StaticStep | None = None
        self.plain = False
        # Of greedy search: where its first token and the present step's begin, what former steps chose.
        self.base = self.begun = length
        self.pieces: list[Tensor] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        """Feed the tokens (B,) and return the next logits: the step of :func:`generate_rows`."""
        if not self.plain and (self.step is None or self.length >= self.step.capacity):
            try:
                self._enter(False)
            except StepError as error:
                self.give_up(error)
        self.length += 1
        if self.plain or self.step is None:
            return self._plainly(tokens)
        return self.step.run(tokens)

    def give_up(self, error: StepError) -> None:
        """Go on with transformers' step, on transformers' cache, and tell why."""
        self.decoder.unable = str(error)
        self.decoder.say(str(error))
        if self.step is not None:
            self.step.store(self.cache, self.length)
            self.arguments.update(self._inputs_so_far())
        self.plain = True

    # -- greedy search: the step of generate_greedily ----------------------------------------------------------------

    def start(self, tokens: Tensor, unfinished: Tensor, ends: Tensor, pad: Tensor) -> _Run:
        """Begin with the first tokens; see :func:`generate_greedily`."""
        self.base = self.length
        self._enter(True)
        assert self.step is not None
        self.step.tokens.copy_(tokens[:, None])
        self.step.unfinished.copy_(unfinished)
        self.step.ends.fill_(-1)[: ends.shape[0]].copy_(ends)
        self.step.pad.copy_(pad)
        self.step.finished.fill_(-1)
        return self

    def advance(self) -> None:
        """Run one step."""
        assert self.step is not None
        if self.length >= self.step.capacity:
            old = self.step
            self.pieces.append(old.text[:, self.begun + 1 : self.length + 1].clone())
            kept = [tensor.clone() for tensor in old.bookkeeping()]
            self._enter(True)
            for tensor, value in zip(self.step.bookkeeping(), kept, strict=True):
                tensor.copy_(value)
        self.step.advance(True)
        self.length += 1

    @property
    def finished(self) -> Tensor:
        """Where the text ended, on the device."""
        assert self.step is not None
        return self.step.finished

    def text(self, count: int) -> Tensor:
        """Return the first ``count`` tokens that the steps chose."""
        assert self.step is not None
        pieces = [*self.pieces, self.step.text[:, self.begun + 1 : self.length + 1]]
        return torch.cat(pieces, dim=1)[:, :count]

    # -- moving in and out -------------------------------------------------------------------------------------------

    def _enter(self, greedy: bool) -> None:
        """Move the cache into a step with room for more."""
        source, positions, mask = self.cache, self.position_ids, self.mask
        if self.step is not None:
            self.step.store(source, self.length)
            positions = None if self.step.position_ids is None else self.step.position_ids - 1
            mask = self.step.mask[:, : self.length].clone()
        needed = max(self.needed, self.length + 1)
        step = self.decoder.step(source, self.batch, self.length, needed, greedy, self)
        step.load(source, self.length, mask, positions)
        self.step, self.begun = step, self.length
        if not self.kept:
            for layer in source.layers:
                layer.keys = layer.keys[:, :, :0]
                layer.values = layer.values[:, :, :0]

    def _inputs_so_far(self) -> dict[str, Tensor]:
        """Return mask and positions as transformers' loop would hold them after the tokens fed so far."""
        assert self.step is not None
        found: dict[str, Tensor] = {}
        if self.mask is not None:
            found["attention_mask"] = self.step.mask[:, : self.length].clone()
        if self.step.position_ids is not None:
            found["position_ids"] = self.step.position_ids - 1
        return found

    def _plainly(self, tokens: Tensor) -> Tensor:
        """Run transformers' step on its own cache: what is left when no static step can be had."""
        model: Any = self.decoder.model
        for name in ("attention_mask", "position_ids"):
            given = self.arguments.get(name)
            if given is not None:
                last = given[..., -1:]
                self.arguments[name] = torch.cat([given, last + 1 if name == "position_ids" else last], dim=-1)
        inputs = model.prepare_inputs_for_generation(
            tokens[:, None], next_sequence_length=1, **{**self.arguments, "past_key_values": self.cache}
        )
        return model(**inputs, return_dict=True).logits[:, -1]

    def finish(self, length: int) -> None:
        """Leave the cache that the caller keeps with its first ``length`` positions."""
        if not self.kept:
            return
        if self.plain:
            if self.length > length:
                self.cache.crop(length - self.length)
        elif self.step is not None:
            self.step.store(self.cache, length)


def arrange(model: nn.Module) -> None:
    """Bring the weights into the order that kernels read fastest, where that is offered."""
    try:
        arranging = importlib.import_module("qhub.kernels.arranging")
    except ImportError:
        return
    arranging.arrange(model)
