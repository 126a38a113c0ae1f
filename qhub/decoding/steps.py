"""One decode step over a static cache, as a thing that can be run again and again.

Everything that changes from step to step lies in device tensors at fixed places. Parts of the model that were
recognised run in fused form; the rest is the model's own code, called as transformers calls it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from qhub.decoding import layers as fusing
from qhub.decoding.operations import offered
from qhub.decoding.recipes import JoinedLayers, State
from qhub.decoding.rounding import disagreement
from qhub.decoding.trials import calls_of

__all__ = ["MOST_ENDS", "StaticStep"]

logger = logging.getLogger("qhub")

# How many different tokens may end a text under greedy search on the device.
MOST_ENDS = 32


def _static_layers(source: Any, capacity: int) -> list[Any]:
    """Return transformers' static layers shaped like the filled dynamic ones of ``source``, on their devices."""
    from transformers.cache_utils import StaticLayer

    result = []
    for layer in source.layers:
        static = StaticLayer(max_cache_len=capacity)
        static.lazy_initialization(layer.keys, layer.values)
        result.append(static)
    return result


class StaticStep:
    """Feeds one token a row to ``model`` and returns the next logits; the cache lies in buffers of ``capacity``.

    ``source``: the cache after the prompt, for shapes. ``position_ids``: of the prompt's last token, (..., B, n); None
    where the model takes none. ``extra``: further arguments of the model's forward, the same in each step.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Any,
        batch: int,
        capacity: int,
        position_ids: Tensor | None,
        joined: dict[nn.Module, JoinedLayers],
        extra: dict[str, Any],
    ):
        from transformers.cache_utils import Cache

        self.model: Any = model
        self.batch, self.capacity, self.extra = batch, capacity, extra
        device = source.layers[0].keys.device
        self.cache: Any = Cache(layers=_static_layers(source, capacity))
        position = torch.zeros((), dtype=torch.long, device=device)
        self.state = State(position, torch.zeros(batch, dtype=torch.long, device=device), self.cache, joined)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.mask = torch.ones(batch, capacity, dtype=torch.long, device=device)
        self.position_ids = None
        if position_ids is not None:
            shape = (*position_ids.shape[:-2], batch, 1)
            self.position_ids = torch.zeros(shape, dtype=position_ids.dtype, device=device)
        # What greedy search keeps on the device: the tokens so far by position, which rows go on, where all ended.
        self.text = torch.zeros(batch, capacity + 1, dtype=torch.long, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.long, device=device)
        self.ends = torch.full((MOST_ENDS,), -1, dtype=torch.long, device=device)
        self.pad = torch.zeros(1, dtype=torch.long, device=device)
        self.finished = torch.full((), -1, dtype=torch.long, device=device)
        self.forms: fusing.Forms = {}
        self.found: dict[str, int] = {}
        self.masks: Any = None

    # -- state -------------------------------------------------------------------------------------------------------

    def load(self, source: Any, length: int, mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Take over the ``length`` cached positions of ``source``; the next token goes to index ``length``.

        ``mask``: (B, >= length), zero at padding; None: no padding. ``position_ids``: of the last cached token.
        """
        ours, theirs = [], []
        for layer, dynamic in zip(self.cache.layers, source.layers, strict=True):
            # A sliding layer kept the last positions only.
            count = dynamic.keys.shape[2]
            for to, given in ((layer.keys, dynamic.keys), (layer.values, dynamic.values)):
                ours.append(to[:, :, length - count : length])
                theirs.append(given)
        # What an earlier text left behind is masked, but zero times infinity is no number.
        torch._foreach_zero_([layer.values for layer in self.cache.layers])
        torch._foreach_copy_(ours, theirs)
        self.mask.fill_(1)
        self.state.start.zero_()
        if mask is not None:
            self.mask[:, :length].copy_(mask[:, :length])
            self.state.start.copy_((mask[:, :length] != 0).int().argmax(1))
        self._place(length)
        if self.position_ids is not None and position_ids is not None:
            self.position_ids.copy_(position_ids[..., -1:] + 1)

    def store(self, target: Any, length: int) -> None:
        """Write the first ``length`` positions into ``target``, a cache of dynamic layers, as its own copies."""
        for layer, dynamic in zip(self.cache.layers, target.layers, strict=True):
            first = 0
            if dynamic.is_sliding:
                first = max(0, length - dynamic.sliding_window + 1)
                dynamic.cumulative_length = length
            dynamic.keys = layer.keys[:, :, first:length].clone()
            dynamic.values = layer.values[:, :, first:length].clone()

    def _place(self, length: int) -> None:
        self.state.position.fill_(length)
        for layer in self.cache.layers:
            if layer.cumulative_length is not self.state.position:
                layer.cumulative_length.fill_(length)

    def bookkeeping(self) -> list[Tensor]:
        """Return what greedy search keeps, but for the text."""
        return [self.tokens, self.unfinished, self.ends, self.pad, self.finished]

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self, tokens: Tensor) -> Tensor:
        """Feed ``tokens`` (B,) and return the logits (B, vocabulary); they may be overwritten by the next step."""
        self.tokens.copy_(tokens[:, None])
        return self.advance(False)

    @torch.no_grad()
    def advance(self, greedy: bool) -> Tensor:
        """Run one step on the buffers; nothing in it depends on values the host would have to read.

        ``greedy``: the likeliest tokens become those of the next step, and are noted in ``text``.
        """
        with fusing.in_form(self.forms):
            logits = self._model()
        if greedy:
            offered(logits.device.type)[0].pick(
                logits,
                self.tokens,
                self.unfinished,
                self.ends,
                self.pad,
                self.text,
                self.state.position,
                self.finished,
            )
        self.state.position.add_(1)
        if self.position_ids is not None:
            self.position_ids.add_(1)
        return logits

    def ready(self, greedy: bool) -> None:
        """Set up what running with these settings needs; the state is lost."""

    def _model(self) -> Tensor:
        inputs: dict[str, Any] = dict(self.extra, use_cache=True)
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids
        if self.masks is None:
            inputs = self.model.prepare_inputs_for_generation(
                self.tokens,
                next_sequence_length=1,
                past_key_values=self.cache,
                attention_mask=self.mask,
                **inputs,
            )
        else:
            inputs.update(input_ids=self.tokens, past_key_values=self.cache, attention_mask=self.masks)
        return self.model(**inputs, return_dict=True).logits[:, -1]

    # -- trying ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fuse(self) -> None:
        """Recognise the model's parts on a full cache of random numbers, and check the whole with them in place."""
        place = self.capacity - 1
        self.randomize(place)
        with calls_of(self.model) as calls:
            plain = self._model().clone()
        self._place(place)
        self.forms, self.found = fusing.recognise(self.model, calls, offered(plain.device.type), self.state)
        if self.found["attentions"] == len(self.cache.layers):
            # Nobody reads the masks any more; their form stays what the model expects.
            self.masks = self.model.prepare_inputs_for_generation(
                self.tokens,
                next_sequence_length=1,
                past_key_values=self.cache,
                attention_mask=self.mask,
                position_ids=self.position_ids,
            )["attention_mask"]
            for layer in self.cache.layers:
                layer.cumulative_length = self.state.position
        self._place(place)
        self.tokens.copy_(self._probe_tokens)
        seen = self.advance(False).clone()
        reason = disagreement(self.model, {"logits": seen}, {"logits": plain}, lambda: {"logits": self._plainly(place)})
        if reason is not None:
            logger.info("qhub: the fused parts together do not compute what the model computes: left out (%s)", reason)
            self.forms, self.found, self.masks = {}, {}, None
            self._count_apart()

    def _count_apart(self) -> None:
        """Give each layer of the cache a position of its own: the model's code counts them up one by one."""
        for layer in self.cache.layers:
            layer.cumulative_length = self.state.position.clone()

    def _plainly(self, position: int) -> Tensor:
        """Return what the model's own code computes from random numbers at ``position``; the forms stay for later."""
        masks, counters = self.masks, [layer.cumulative_length for layer in self.cache.layers]
        self.masks = None
        self._count_apart()
        self.randomize(position)
        logits = self._model().clone()
        self.masks = masks
        for layer, counter in zip(self.cache.layers, counters, strict=True):
            layer.cumulative_length = counter
        return logits

    def randomize(self, position: int) -> None:
        """Fill the cache and the inputs with random numbers, and stand at ``position``."""
        generator = torch.Generator(self.tokens.device).manual_seed(position)
        for layer in self.cache.layers:
            for tensor in (layer.keys, layer.values):
                tensor.normal_(generator=generator)
        rows = torch.arange(self.batch, device=self.tokens.device)
        # The first row has no padding, the last has much.
        self.state.start.copy_(rows * position // (2 * self.batch))
        places = torch.arange(self.capacity, device=self.tokens.device)
        self.mask.copy_(places >= self.state.start[:, None])
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self._probe_tokens = torch.randint(
            vocabulary, self.tokens.shape, generator=generator, device=self.tokens.device
        )
        self.tokens.copy_(self._probe_tokens)
        self.unfinished.fill_(1)
        self.finished.fill_(-1)
        self._place(position)
        if self.position_ids is not None:
            self.position_ids.copy_((position - self.state.start)[:, None].expand_as(self.position_ids))
