"""Watches a model with adapters on a little text: what its layers take, and what it predicts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qhub.calibration import CalibrationOptions
from qhub.errors import QhubError
from qhub.evaluate import kl_divergence
from qhub.merging import MergedLayer, MergeOptions

__all__ = ["Observed", "Text", "observed", "observing", "text_for", "watched"]

logger = logging.getLogger("qhub")

# Logits kept for the comparison: 256 MB in float32.
_LOGITS = 1 << 26
# Elements of a slab: 64 MB, which the C library gives back to the system as soon as it is free.
_SLAB = 1 << 25


@dataclass
class Observed:
    """Holds what is known of a model while adapters are merged into it.

    ``names``: of its tuner layers. ``inputs``: (rows, K) of each that was reached. ``layers``: filled by the merge.
    ``reversible``: whether the old codes are kept for unmerging. ``dense``: whether merged weights become dense.
    """

    names: dict[Any, str]
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    layers: list[MergedLayer] = field(default_factory=list)
    reversible: bool = True
    dense: bool = False


_observed: ContextVar[Observed | None] = ContextVar("qhub_observed", default=None)


def observed() -> Observed | None:
    """Return what is known of the model being merged; None when a single layer is merged by itself."""
    return _observed.get()


@contextmanager
def observing(found: Observed) -> Iterator[Observed]:
    """Make ``found`` what :func:`observed` returns inside the block."""
    token = _observed.set(found)
    try:
        yield found
    finally:
        _observed.reset(token)


class Text:
    """Is a little text that a model is measured on; empty where none can be had, and ``notes`` say why.

    ``samples``: keyword arguments of the model each.
    """

    def __init__(self, model: Any, samples: list[dict[str, Any]], notes: list[str]) -> None:
        self._model = model
        self.samples = samples
        self.notes = notes

    @torch.no_grad()
    def run(self) -> Tensor | None:
        """Pass the text through the model; return logits (positions, vocabulary), not more than fit into 256 MB."""
        kept: list[Tensor] = []
        room = _LOGITS
        with _still(self._model):
            for sample in self.samples:
                logits = getattr(self._model(**sample), "logits", None)
                if isinstance(logits, Tensor) and logits.ndim >= 2 and logits.shape[-1] > 1 and room > 0:
                    flat = logits.float().reshape(-1, logits.shape[-1])[: max(1, room // logits.shape[-1])]
                    kept.append(flat.cpu())
                    room -= flat.numel()
        return torch.cat(kept) if kept else None

    def kl(self, reference: Tensor | None) -> tuple[float | None, int]:
        """Return the mean KL (nats) of the model's predictions now from ``reference``, and over how many positions."""
        if reference is None:
            return None, 0
        now = self.run()
        assert now is not None
        return float(kl_divergence(reference, now).mean()), len(now)


def text_for(model: Any, options: MergeOptions) -> Text:
    """Return text for ``model``: what ``options`` give, else what it writes itself, else random tokens."""
    if options.samples == 0:
        return Text(model, [], ["nothing was measured: 0 samples were asked for"])
    if not hasattr(model, "config") or not hasattr(model.config, "get_text_config"):
        return Text(model, [], [f"nothing was measured: a {type(model).__name__} is no model of transformers"])
    notes: list[str] = []
    try:
        with _still(model):
            samples = _samples(model, options, notes)
            device = model.get_input_embeddings().weight.device
    except Exception as error:
        return Text(model, [], [_given_up(options, error)])
    return Text(
        model, [{n: v.to(device) if isinstance(v, Tensor) else v for n, v in one.items()} for one in samples], notes
    )


def _given_up(options: MergeOptions, error: Exception) -> str:
    """Return why nothing is measured; raise ``error`` where the text was given, or the error is one of ours.

    Any code can be in a model's forward; a merge goes on without what text of the model's own would have told.
    """
    if options.data is not None or isinstance(error, QhubError):
        raise error
    logger.warning("merging: the model cannot be run on text of its own (%s: %s)", type(error).__name__, error)
    return f"nothing was measured: the model does not run on random tokens ({error})"


def _samples(model: Any, options: MergeOptions, notes: list[str]) -> list[dict[str, Any]]:
    from qhub.integrations.transformers.calibrating import decoder_tokens, loaded_tokenizer
    from qhub.integrations.transformers.writing import written_samples

    text = model.config.get_text_config()
    length = min(options.length, getattr(text, "max_position_embeddings", None) or options.length)
    wanted = CalibrationOptions(
        data=options.data, tokenizer=options.tokenizer, samples=options.samples, length=length, seed=options.seed
    )
    if options.data is not None:
        from qhub.calibration.data import samples_of

        found = samples_of(options.data, loaded_tokenizer(model, wanted), options.samples, length)
    elif model.can_generate() and not getattr(model.config, "is_encoder_decoder", False):
        found = _together(written_samples(model, loaded_tokenizer(model, wanted, local=True), wanted, length))
    else:
        notes.append("measured on random tokens: this model writes no text by itself")
        generator = torch.Generator().manual_seed(options.seed)
        found = [{"input_ids": torch.randint(text.vocab_size, (options.samples, length), generator=generator)}]
    return [decoder_tokens(model, one) for one in found]


def _together(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return samples of equal length as one batch."""
    return [{"input_ids": torch.cat([one["input_ids"] for one in samples])}]


def watched(
    text: Text, layers: Iterable[nn.Module], options: MergeOptions
) -> tuple[dict[nn.Module, Tensor], Tensor | None]:
    """Pass ``text`` through the model once; return the inputs (rows, K) bfloat16 of ``layers``, and the logits.

    Where that cannot be, the text is emptied and its notes say why; an error is raised if ``options`` gave it.
    """
    found: dict[nn.Module, list[Tensor]] = {}
    shelf = _Shelf()

    def keep(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            found.setdefault(layer, []).append(shelf.put(args[0].detach()))

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        logits = text.run()
    except Exception as error:
        text.samples, text.notes = [], [_given_up(options, error)]
        return {}, None
    finally:
        for handle in handles:
            handle.remove()
    if text.samples and logits is None:
        text.notes.append("KL was not measured: the model gives no logits")
    # One batch, the usual case, stays the rows that projections of the same input share.
    return {layer: seen[0] if len(seen) == 1 else torch.cat(seen) for layer, seen in found.items()}, logits


class _Shelf:
    """Keeps copies of tensors in large slabs, so that memory freed between them is not left in holes.

    What layers share, one after the other, is kept once.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.bfloat16)
        self._used = 0
        self._last: Tensor | None = None
        self._copy = self._slab

    def put(self, tensor: Tensor) -> Tensor:
        """Return a copy (rows, K) of ``tensor`` (..., K)."""
        if self._last is not None and _same_memory(self._last, tensor):
            return self._copy
        rows = tensor.reshape(-1, tensor.shape[-1])
        if self._slab.device != tensor.device or self._used + rows.numel() > self._slab.numel():
            self._slab = torch.empty(max(_SLAB, rows.numel()), dtype=torch.bfloat16, device=tensor.device)
            self._used = 0
        self._copy = self._slab[self._used : self._used + rows.numel()].view(rows.shape).copy_(rows)
        self._used += rows.numel()
        # Held until the next one comes, so that its memory is not given to that.
        self._last = tensor
        return self._copy


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Turn dropout off for a block."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, before in training.items():
            module.training = before
