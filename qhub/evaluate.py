"""Measures a causal language model: perplexity, distance from a base model, speed. Pure functions that know no method.

The protocol, which every quality figure of this project follows: the first 150,000 characters of a text, tokenized
without special tokens; its first 24 windows of 512 tokens, each on its own; float32. Perplexity is the exponential of
the mean of the windows' losses.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhub.errors import UnsupportedError

__all__ = [
    "Comparison",
    "DecodeSpeed",
    "Perplexity",
    "compare",
    "decode_speed",
    "kl_divergence",
    "perplexity",
    "windows_of",
]

# Positions whose logits are widened to float64 at a time: 250 MiB for each of four tensors at a vocabulary of 256,000.
_POSITIONS = 128


@dataclass(frozen=True)
class Perplexity:
    """Is the perplexity of a model on a text.

    ``value``: exp(mean of ``losses``). ``standard_error``: of ``value``, from how the windows' losses spread; None
    for a single window. ``losses``: mean negative log-likelihood per window, in nats. ``tokens``: how many were read.
    ``seconds``: what the forward passes took.
    """

    value: float
    standard_error: float | None
    losses: tuple[float, ...]
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Return how many tokens a second the forward passes read."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Comparison:
    """Says how far a model's predictions are from those of its base, position by position.

    ``kl_mean``, ``kl_median``, ``kl_p99``: of KL(base || model) in nats. ``top1_agreement``: share of positions, 0 to
    1, where both find the same token likeliest. ``positions``: how many were compared.
    """

    model: Perplexity
    base: Perplexity
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    positions: int

    @property
    def difference(self) -> float:
        """Return the model's perplexity less the base's."""
        return self.model.value - self.base.value

    @property
    def difference_error(self) -> float | None:
        """Return the standard error of :attr:`difference` from the pairs of windows; None for a single window.

        Hard windows are hard for both models, so it is far smaller than the two models' own errors would suggest.
        """
        pairs = [a - b for a, b in zip(self.model.losses, self.base.losses, strict=True)]
        return _error(self.model.value, pairs)


@dataclass(frozen=True)
class DecodeSpeed:
    """Is the speed of greedy generation at batch size 1: ``new_tokens`` in each run, ``seconds`` of the runs."""

    new_tokens: int
    seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Return the new tokens a second of the median run."""
        return self.new_tokens / statistics.median(self.seconds)


def windows_of(
    tokenizer: Any, text: str, *, count: int = 24, length: int = 512, characters: int | None = 150_000
) -> Tensor:
    """Tokenize ``text`` and cut it into windows: (windows, length) int64.

    ``characters``: read so many from the beginning; None for all. ``count``: windows at most; a shorter text gives
    fewer, what does not fill a window is left out. Raises :class:`UnsupportedError` when the text does not fill one.
    """
    if count < 1 or length < 2:
        raise UnsupportedError(f"{count} windows of {length} tokens: at least one window of two tokens is needed")
    ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < length:
        raise UnsupportedError(
            f"the text has {len(ids)} tokens, less than one window of {length}: take a longer text or smaller windows"
        )
    count = min(count, len(ids) // length)
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)


def perplexity(model: Any, tokens: Tensor) -> Perplexity:
    """Return the perplexity of ``model`` on ``tokens`` (windows, length) int64; each window is read on its own.

    Raises :class:`UnsupportedError` when the model cannot read such tokens.
    """
    _check(model, tokens)
    losses, seconds = [], 0.0
    for window in tokens:
        logits, took = _logits(model, window)
        losses.append(_loss(logits, window))
        seconds += took
    return _perplexity(losses, tokens.numel(), seconds)


def compare(model: Any, base: Any, tokens: Tensor) -> Comparison:
    """Compare the predictions of ``model`` with those of ``base`` at each position of ``tokens`` (windows, length).

    ``tokens``: int64. Raises :class:`UnsupportedError` when one of them cannot read such tokens, or their
    vocabularies differ in size.
    """
    for one in (model, base):
        _check(one, tokens)
    divergences: list[Tensor] = []
    agreed = 0
    losses: tuple[list[float], list[float]] = ([], [])
    seconds = [0.0, 0.0]
    for window in tokens:
        found, took = _logits(model, window)
        wanted, base_took = _logits(base, window)
        if found.shape != wanted.shape:
            raise UnsupportedError(
                f"the model predicts {found.shape[-1]} tokens and the base {wanted.shape[-1]}: "
                "they do not share a vocabulary"
            )
        wanted = wanted.to(found.device)
        losses[0].append(_loss(found, window))
        losses[1].append(_loss(wanted, window))
        seconds = [seconds[0] + took, seconds[1] + base_took]
        divergences.append(kl_divergence(wanted, found).cpu())
        agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())
    kl = torch.cat(divergences)
    return Comparison(
        _perplexity(losses[0], tokens.numel(), seconds[0]),
        _perplexity(losses[1], tokens.numel(), seconds[1]),
        kl_mean=float(kl.mean()),
        kl_median=float(kl.median()),
        kl_p99=float(kl.quantile(0.99)),
        top1_agreement=agreed / tokens.numel(),
        positions=tokens.numel(),
    )


def decode_speed(model: Any, prompt: Tensor, *, new_tokens: int = 64, runs: int = 3) -> DecodeSpeed:
    """Time greedy generation after ``prompt`` (length,) int64 at batch size 1.

    Reading the prompt is part of the time. One run more than ``runs`` comes first and is not counted. Raises
    :class:`UnsupportedError` when the model does not generate.
    """
    if not model.can_generate():
        raise UnsupportedError(f"{type(model).__name__} generates no text, so there is no decoding to time")
    longest = _longest(model)
    if longest is not None and prompt.numel() + new_tokens > longest:
        raise UnsupportedError(
            f"{prompt.numel()} tokens and {new_tokens} new ones: {type(model).__name__} was made for {longest} at most"
        )
    ids = prompt.reshape(1, -1).to(_device(model))
    mask = torch.ones_like(ids)
    # An end token must not cut a run short.
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
    seconds = []
    for _ in range(runs + 1):
        _synchronize(ids.device)
        start = time.perf_counter()
        made = model.generate(ids, attention_mask=mask, **options)
        _synchronize(ids.device)
        seconds.append(time.perf_counter() - start)
    return DecodeSpeed(int(made.shape[1]) - ids.shape[1], tuple(seconds[1:]))


def kl_divergence(base: Tensor, model: Tensor) -> Tensor:
    """Return KL(base || model) in nats per position, (positions,), for logits (positions, vocabulary).

    sum_v p(v) (log p(v) - log q(v)), p of ``base`` and q of ``model`` (Kullback and Leibler 1951, eq. 2.4), in float64
    where the device has it.
    """
    wide = torch.float32 if base.device.type == "mps" else torch.float64
    pieces = []
    for one, other in zip(_chunks(base), _chunks(model), strict=True):
        log_p, log_q = one.to(wide).log_softmax(-1), other.to(wide).log_softmax(-1)
        # 0 * (-inf - q) where the base rules a token out is a zero by the definition, not NaN.
        pieces.append(torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(pieces)


def _chunks(logits: Tensor) -> Iterator[Tensor]:
    return iter(logits.split(_POSITIONS))


def _device(model: Any) -> torch.device:
    # Where the inputs go: a model spread over devices begins at its embedding.
    embedding = model.get_input_embeddings()
    device = embedding.weight.device if embedding is not None else model.device
    return model.device if device.type == "meta" else device


@torch.no_grad()
def _logits(model: Any, window: Tensor) -> tuple[Tensor, float]:
    """Return the logits (length, vocabulary) for one window, and the seconds the forward pass took."""
    ids = window.reshape(1, -1).to(_device(model))
    _synchronize(ids.device)
    start = time.perf_counter()
    logits = model(input_ids=ids, use_cache=False).logits
    _synchronize(logits.device)
    return logits[0], time.perf_counter() - start


def _loss(logits: Tensor, window: Tensor) -> float:
    """Return the mean negative log-likelihood of a window's tokens but the first, in nats."""
    targets = window[1:].to(logits.device)
    return float(torch.nn.functional.cross_entropy(logits[:-1].float(), targets))


def _perplexity(losses: list[float], tokens: int, seconds: float) -> Perplexity:
    mean = statistics.fmean(losses)
    # exp overflows beyond 709 nats per token, which only a broken model reaches.
    value = math.exp(mean) if mean < 700 else math.nan if math.isnan(mean) else math.inf
    return Perplexity(value, _error(value, losses), tuple(losses), tokens, seconds)


def _error(value: float, losses: list[float]) -> float | None:
    """Return the standard error of exp(mean(losses)) = ``value`` to first order: value * s / sqrt(n)."""
    if len(losses) < 2:
        return None
    # statistics.stdev raises on NaN.
    return value * statistics.stdev(losses) / math.sqrt(len(losses)) if math.isfinite(sum(losses)) else math.nan


def _check(model: Any, tokens: Tensor) -> None:
    if tokens.ndim != 2 or not len(tokens):
        raise UnsupportedError(
            f"tokens have shape {tuple(tokens.shape)}: expected (windows, length), at least one window"
        )
    if not model.can_generate():
        raise UnsupportedError(
            f"{type(model).__name__} predicts no next token: perplexity needs a causal language model"
        )
    longest, vocabulary = _longest(model), getattr(model.config.get_text_config(), "vocab_size", None)
    if longest is not None and tokens.shape[1] > longest:
        raise UnsupportedError(
            f"windows of {tokens.shape[1]} tokens: {type(model).__name__} was made for {longest} at most"
        )
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise UnsupportedError(
            f"the text has token {int(tokens.max())}, {type(model).__name__} knows {vocabulary}: "
            "the tokenizer is another model's"
        )


def _longest(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _synchronize(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
