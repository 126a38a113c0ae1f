"""Merges adapters into a whole quantized model: checked before anything is changed, reported when it is done."""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qhub.errors import UnsupportedError
from qhub.integrations.peft import layers
from qhub.integrations.peft.observing import Observed, Text, observed, observing, text_for, watched
from qhub.merging import MergeReport, current_options

__all__ = ["adapted_layers", "merge_adapter", "merge_and_unload", "new_checksums", "note_merged", "quantized_layers"]

logger = logging.getLogger("qhub")

# Where a model's config says which adapters its quantized weights hold already.
_MERGED = "merged_adapters"
# Above it the merged model has lost much of what the adapters did.
_MUCH_LOST = 0.5


def adapted_layers(model: nn.Module) -> dict[Any, str]:
    """Return the tuner layers of ``model``, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer")
    }


def quantized_layers(model: nn.Module) -> dict[Any, str]:
    """Return the tuner layers of ``model`` that have quantized base weights, with their names."""
    return {layer: name for layer, name in adapted_layers(model).items() if layers.quantized_of(layer)}


def merge_adapter(
    tuner: Any, original: Callable[..., None], adapter_names: list[str] | None = None, safe_merge: bool = False
) -> None:
    """Do what ``original``, a tuner model's ``merge_adapter``, does; all layers or, when one fails, none.

    The old codes stay in memory, for unmerging. Raises :class:`UnsupportedError` when the adapters are merged already,
    hold NaN, or a weight cannot be written into.
    """
    found = quantized_layers(tuner.model)
    if not found or observed() is not None:
        original(adapter_names=adapter_names, safe_merge=safe_merge)
        return
    wanted = _wanted(found, adapter_names)
    if wanted and all(_mergeable(layer, wanted) <= set(layer.merged_adapters) for layer in found):
        raise UnsupportedError(
            f"{_listed(wanted)} is merged already: nothing was changed. Unmerge it first (unmerge_adapter()), or merge "
            "another"
        )
    with _measured(tuner, found, adapter_names, reversible=True):
        merged = {layer for layer in found if layer.merged}
        try:
            original(adapter_names=adapter_names, safe_merge=safe_merge)
        except BaseException:
            for layer in found:
                if layer not in merged and layer.merged:
                    layer.unmerge()
            raise


def merge_and_unload(
    tuner: Any,
    original: Callable[..., nn.Module],
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> nn.Module:
    """Do what ``original``, a tuner model's ``merge_and_unload``, does; the model gets ``qhub_merge_report``.

    The report, a :class:`qhub.merging.MergeReport`, says how far the merged model's predictions are from those with the
    adapters on top. Raises :class:`UnsupportedError`, before anything is changed, when the adapters are merged already,
    hold NaN, or a weight cannot be written into.
    """
    arguments = {"progressbar": progressbar, "safe_merge": safe_merge, "adapter_names": adapter_names}
    if observed() is not None:
        return original(**arguments)
    found = quantized_layers(tuner.model)
    if not found:
        if getattr(tuner, "_qhub_unloaded", False):
            raise UnsupportedError(
                "these adapters were merged and unloaded already: the model that merge_and_unload() returned holds them"
            )
        return original(**arguments)
    sums = new_checksums(tuner, found, adapter_names)
    with _measured(tuner, found, adapter_names, reversible=False) as report:
        model = original(**arguments)
        for layer in found:
            layers.forget(layer)
    tuner._qhub_unloaded = True
    note_merged(model, sums)
    model.qhub_merge_report = report  # type: ignore[assignment]
    return model


@contextmanager
def _measured(
    tuner: Any, found: dict[Any, str], adapter_names: list[str] | None, reversible: bool
) -> Iterator[MergeReport]:
    """Check the adapters, then compare the model's predictions before the block with those after it."""
    for layer, name in found.items():
        layers.check(layer, adapter_names, name)
    start = time.perf_counter()
    wanted = _wanted(found, adapter_names)
    report = MergeReport(adapters=wanted)
    seen = Observed(names=found, layers=report.layers, reversible=reversible)
    merged_before = any(layer.merged for layer in found)
    reference: Tensor | None = None
    if merged_before:
        text = Text(tuner.model, [], ["nothing was measured: adapters were merged before this call"])
    else:
        options = current_options()
        text = text_for(tuner.model, options)
        active = {} if adapter_names is None else {"_active_adapter": adapter_names}
        with _with_attributes(found, **active):
            seen.inputs, reference = watched(text, found, options)
        with _with_attributes(found, _disable_adapters=True):
            report.kl_without, _ = text.kl(reference)
    report.notes += text.notes
    with observing(seen), warnings.catch_warnings():
        # PEFT says of every quantized base that merging rounds; the report says by how much.
        warnings.filterwarnings("ignore", message="Merge lora module to .* may get different generations")
        yield report
    report.kl, report.tokens = text.kl(reference)
    report.seconds = time.perf_counter() - start
    tuner.model.qhub_merge_report = report
    lost = report.kept is not None and report.kept < 1 - _MUCH_LOST
    logger.log(logging.WARNING if lost else logging.INFO, "%s", report.summary())
    if lost:
        logger.warning(
            "merging rounded away much of what the adapters did: keep them unmerged, merge into the unquantized model "
            "and quantize that, or use more bits"
        )


def _wanted(found: dict[Any, str], adapter_names: list[str] | None) -> list[str]:
    names: dict[str, None] = {}
    for layer in found:
        names |= dict.fromkeys(layer.active_adapters if adapter_names is None else adapter_names)
    return list(names)


def _mergeable(layer: Any, names: list[str]) -> set[str]:
    return set(names) & set(layer._get_available_adapters())


def _listed(names: list[str]) -> str:
    return " and ".join(f"adapter {name!r}" for name in names)


@contextmanager
def _with_attributes(found: dict[Any, str], **values: Any) -> Iterator[None]:
    """Set attributes of all layers for a block; not through PEFT's setters, which also decide what is trained."""
    before = {layer: {name: getattr(layer, name) for name in values} for layer in found}
    try:
        for layer in found:
            vars(layer).update(values)
        yield
    finally:
        for layer, held in before.items():
            vars(layer).update(held)


def new_checksums(tuner: Any, found: dict[Any, str], adapter_names: list[str] | None) -> dict[str, str]:
    """Return the checksum of each adapter; raise :class:`UnsupportedError` if the model's weights hold one of them."""
    sums = {name: _checksum(found, name) for name in _wanted(found, adapter_names)}
    held = {one["sha256"] for one in getattr(getattr(tuner.model, "config", None), _MERGED, None) or []}
    for name, checksum in sums.items():
        if checksum in held:
            raise UnsupportedError(
                f"adapter {name!r} was merged into these weights before (see {_MERGED} in the model's config): nothing "
                "was changed. Load the base model without it, or merge another adapter"
            )
    return sums


def note_merged(model: Any, sums: dict[str, str]) -> None:
    """Write the adapters that ``model``'s weights now hold into its config."""
    config = getattr(model, "config", None)
    if config is not None:
        news = [{"name": name, "sha256": checksum} for name, checksum in sums.items()]
        setattr(config, _MERGED, [*(getattr(config, _MERGED, None) or []), *news])


def _checksum(found: dict[Any, str], adapter: str) -> str:
    """Return the SHA-256 of an adapter's tensors."""
    digest = hashlib.sha256()
    for layer, name in found.items():
        for owner in layer.adapter_layer_names:
            held = getattr(layer, owner, None)
            if not isinstance(held, (nn.ModuleDict, nn.ParameterDict)) or adapter not in held:
                continue
            tensors = held[adapter]
            for tensor in tensors.parameters() if isinstance(tensors, nn.Module) else [tensors]:
                if isinstance(tensor, Tensor):
                    digest.update(f"{name}.{owner}".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
