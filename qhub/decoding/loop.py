"""The generation loop for one continuation a row: transformers' ``_sample``, without waiting for the device.

Same processors, criteria, streamers and outputs in the same order. Whether all rows are finished is read one step late,
and what the surplus step did is undone; where a criterion or a processor is the user's own, it is read at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Generated", "generate_greedily", "generate_rows", "is_greedy", "may_lag"]


class Generated:
    """Is what the loop returns: ``ids`` (B, length), ``scores`` and ``logits`` one a new token or None."""

    def __init__(self, ids: Tensor, scores: tuple | None, logits: tuple | None):
        self.ids, self.scores, self.logits = ids, scores, logits


def may_lag(processors: Any, criteria: Any, device: torch.device) -> bool:
    """Return whether the loop may run one step too far unseen: no code of the user's is called in a step."""
    ours = "transformers.generation."
    known = all(type(item).__module__.startswith(ours) for item in (*processors, *criteria))
    # A function of the user's inside a processor of theirs.
    known = known and not any(type(item).__name__.startswith("PrefixConstrained") for item in processors)
    return known and device.type == "cuda"


class _Stop:
    """Says when all rows are finished, ``lag`` steps late, and hands tokens to a streamer."""

    def __init__(self, lag: int, streamer: Any, device: torch.device):
        self.lag, self.streamer = lag, streamer
        self.waiting: deque[tuple[Tensor, Tensor | None, Any]] = deque()
        self.device = device
        self.finished = False

    def __call__(self, unfinished: Tensor, tokens: Tensor) -> bool:
        flag = unfinished.max() == 0
        if not self.lag:
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            return bool(flag)
        event = None
        held = tokens if self.streamer is not None else None
        if self.device.type == "cuda":
            flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            if held is not None:
                held = torch.empty(held.shape, dtype=held.dtype, pin_memory=True).copy_(held, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((flag, held, event))
        if len(self.waiting) > self.lag:
            self._read()
        return self.finished

    def _read(self) -> None:
        flag, held, event = self.waiting.popleft()
        if event is not None:
            event.synchronize()
        if held is not None:
            self.streamer.put(held.clone())
        self.finished = bool(flag)

    def surplus(self) -> int:
        """Return how many of the last steps came after the end; their tokens are not streamed."""
        while self.waiting and not self.finished:
            self._read()
        return len(self.waiting)


def generate_rows(
    ids: Tensor,
    first_logits: Tensor,
    step: Callable[[Tensor], Tensor],
    processors: Any,
    criteria: Any,
    config: Any,
    streamer: Any = None,
    lag: int = 0,
    unfinished: Tensor | None = None,
) -> Generated:
    """Continue ``ids`` (B, n) until every row is finished.

    ``first_logits``: (B, vocabulary), after the prompt; ``step``: takes the new tokens (B,), returns the next logits;
    ``lag``: how many steps late the end may be noticed; ``unfinished``: (B,) int64, 0 for rows that have ended before;
    None: none has. Source: transformers' GenerationMixin._sample.
    """
    keep = bool(config.return_dict_in_generate)
    scores: tuple | None = () if keep and config.output_scores else None
    raw: tuple | None = () if keep and config.output_logits else None
    has_end = any(hasattr(item, "eos_token_id") for item in criteria)
    pad = config._pad_token_tensor
    pad = pad.to(ids.device) if pad is not None else None
    if unfinished is None:
        unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
    limit = criteria.max_length
    stop = _Stop(lag, streamer, ids.device)
    logits: Tensor = first_logits
    draws: deque[Any] = deque(maxlen=lag + 1)
    while True:
        values = logits.to(copy=True, dtype=torch.float32, device=ids.device)
        chosen = processors(ids, values)
        if scores is not None:
            scores += (chosen,)
        if raw is not None:
            raw += (values,)
        if config.do_sample:
            draws.append(_random_state(ids.device) if lag else None)
            tokens = torch.multinomial(torch.nn.functional.softmax(chosen, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(chosen, dim=-1)
        if has_end and pad is not None:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        ids = torch.cat([ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~criteria(ids, scores)
        done = stop(unfinished, tokens)
        if done or (lag and limit is not None and ids.shape[1] >= limit):
            break
        logits = step(tokens)
    surplus = stop.surplus()
    if surplus:
        ids = ids[:, :-surplus]
        scores = scores[:-surplus] if scores else scores
        raw = raw[:-surplus] if raw else raw
        if config.do_sample:
            _set_random_state(ids.device, draws[-surplus])
    if streamer is not None:
        streamer.end()
    return Generated(ids, scores, raw)


def is_greedy(processors: Any, criteria: Any, config: Any, streamer: Any, most_ends: int) -> bool:
    """Return whether the likeliest token is taken until a length or one of at most ``most_ends`` tokens, and nothing
    else is asked for."""
    if config.do_sample or len(processors) or streamer is not None:
        return False
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return False
    known = {"MaxLengthCriteria", "EosTokenCriteria"}
    names = [type(item).__name__ for item in criteria]
    ours = all(type(item).__module__ == "transformers.generation.stopping_criteria" for item in criteria)
    count = sum(item.eos_token_id.numel() for item in criteria if hasattr(item, "eos_token_id"))
    return ours and set(names) <= known and len(set(names)) == len(names) and count <= most_ends


def generate_greedily(
    ids: Tensor, first_logits: Tensor, start: Callable[..., Any], criteria: Any, config: Any
) -> Generated:
    """Continue ``ids`` with the likeliest tokens, chosen on the device.

    ``start``: called with the first tokens (B,), which rows go on (B,), the tokens that end a text (E,) and the one
    that fills up after it (1,), all int64; returns an object with ``advance()``, ``finished`` (int64 on the device: the
    number of the token after which no row went on, -1 before), ``base`` (the number of the first token) and
    ``text(count)``, the ``count`` tokens after the first.
    """
    device = ids.device
    ends = [item.eos_token_id.to(device).reshape(-1) for item in criteria if hasattr(item, "eos_token_id")]
    end = ends[0] if ends else torch.empty(0, dtype=torch.long, device=device)
    pad = config._pad_token_tensor
    pad = torch.zeros(1, dtype=torch.long, device=device) if pad is None else pad.to(device).reshape(1)
    tokens = torch.argmax(first_logits.float(), dim=-1)
    unfinished = (tokens[:, None] != end).all(1).long()
    begun = ids.shape[1] + 1
    length, limit = begun, criteria.max_length
    ids = torch.cat([ids, tokens[:, None]], dim=-1)
    if length >= limit or bool(unfinished.max() == 0):
        return Generated(ids, None, None)
    run = start(tokens, unfinished, end, pad)
    cuda = device.type == "cuda"
    flags = [torch.full((), -1, dtype=torch.long, pin_memory=cuda) for _ in range(2)]
    events = [torch.cuda.Event() if cuda else None for _ in range(2)]
    ended = -1
    while length < limit and ended < 0:
        run.advance()
        length += 1
        slot = length % 2
        flags[slot].copy_(run.finished, non_blocking=True)
        event, before = events[slot], events[1 - slot]
        if event is not None:
            event.record()
        # The step before this one: the device is not waited for.
        if before is not None and length > begun + 1:
            before.synchronize()
        ended = int(flags[1 - slot]) if length > begun + 1 else -1
    if ended < 0:
        ended = int(run.finished)
    count = length - begun if ended < 0 else ended - run.base
    return Generated(torch.cat([ids, run.text(count)], dim=-1), None, None)


def _random_state(device: torch.device) -> Any:
    """Return where the device's generator stands, without waiting for the device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0].get_offset()
    return torch.get_rng_state()


def _set_random_state(device: torch.device, state: Any) -> None:
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].set_offset(state)
    else:
        torch.set_rng_state(state)
