"""One call of ``generate`` on a decoder: which step runs, how far the cache is filled, what the caller gets back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qhub.decoding.graphs import StepError
from qhub.decoding.loop import Generated
from qhub.decoding.steps import StaticStep

if TYPE_CHECKING:
    from qhub.decoding.decoder import Decoder

__all__ = ["Run"]


class Run:
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

    def start(self, tokens: Tensor, unfinished: Tensor, ends: Tensor, pad: Tensor) -> Run:
        """Begin with the first tokens; see :func:`generate_greedily`."""
        self.base, self.first = self.length, tokens
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
            old, begun = self.step, self.begun
            self._enter(True)
            self.pieces.append(old.text[:, begun + 1 : self.length + 1])
            for tensor, value in zip(self.step.bookkeeping(), old.bookkeeping(), strict=True):
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

    def ended(self, ids: Tensor) -> Generated | None:
        """Return the text if all its rows have ended, which is not noticed at once."""
        count = int(self.finished) - self.base
        if count < 0:
            return None
        return Generated(torch.cat([ids, self.first[:, None], self.text(count)], dim=-1), None, None)

    def resume(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what :func:`generate_rows` goes on with where no further step can be had: text, logits, unfinished."""
        assert self.step is not None
        text = torch.cat([ids, self.first[:, None], self.text(self.length - self.base)], dim=-1)
        unfinished = self.step.unfinished.clone()
        return text, self(text[:, -1]), unfinished

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
