"""One call that merges adapters: into a model in memory, or from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from qhub.errors import CheckpointError, ConfigError, UnsupportedError
from qhub.merging import MergeReport, merging_with

__all__ = ["attach", "merge", "merge_folder"]

_REPORT = "merge.json"


def merge(
    model: Any,
    adapter: str | Path | None = None,
    *,
    out: str | Path | None = None,
    dequantize: bool = False,
    adapter_names: list[str] | None = None,
    **options: Any,
) -> Any:
    """Merge an adapter into ``model``, whose weights stay quantized.

    ``model``: a ``PeftModel``; or a model without adapters, or the folder or repository of one, and then ``adapter`` is
    a folder or repository of a PEFT adapter. ``out``: for folders, where the result goes; ``dequantize``: it is dense
    there. ``adapter_names``: of a ``PeftModel`` that has several; None: the active ones. ``options``: fields of
    :class:`qhub.merging.MergeOptions`: ``grid``, ``data``, ``samples`` and so on.

    Returns the merged model, with ``qhub_merge_report``; for a folder the :class:`qhub.merging.MergeReport`. Raises
    :class:`UnsupportedError` before anything is changed when that cannot be.
    """
    from qhub.integrations.peft.register import install

    install()
    if not isinstance(model, nn.Module):
        if adapter is None or out is None:
            raise ConfigError(f"merging into {model} needs the adapter, and out, a folder for the result")
        return merge_folder(str(model), str(adapter), Path(out), dequantize=dequantize, **options)
    if out is not None or dequantize:
        raise ConfigError("out and dequantize are for merging from folder to folder: save a live model, dequantize it")
    if not hasattr(model, "peft_config") and adapter is None:
        raise ConfigError(f"a {type(model).__name__} has no adapters: give one to merge")
    adapted: Any = model if adapter is None else attach(model, str(adapter))
    _check_weights(adapted, ", ".join(getattr(adapted, "peft_config", {})))
    with merging_with(**options):
        return adapted.merge_and_unload(adapter_names=adapter_names)


def merge_folder(
    base: str,
    adapter: str,
    out: Path,
    *,
    dequantize: bool = False,
    overwrite: bool = False,
    device_map: Any = None,
    **options: Any,
) -> MergeReport:
    """Merge ``adapter`` into the model ``base`` (folders or repositories each) and write the result to ``out``.

    A quantized base stays quantized, in memory and in the result, unless ``dequantize``; then, and when it was dense to
    begin with, the result is exact and is written block by block. The float model is never in memory as a whole.
    ``device_map``: of a quantized base, as for ``from_pretrained``. Raises
    :class:`CheckpointError` when ``out`` holds files, unless ``overwrite``, or when the adapter does not fit.
    """
    from transformers import AutoConfig

    from qhub.integrations.peft.streaming import merge_dense
    from qhub.integrations.transformers import install
    from qhub.integrations.transformers.companions import complete
    from qhub.integrations.transformers.folders import copy_companions, local_folder, model_class

    install()
    if out.exists() and (out.is_file() or any(out.iterdir())) and not overwrite:
        raise CheckpointError(f"{out} holds files already: choose another folder, or overwrite it")
    folder = local_folder(base, weights=True)
    config = AutoConfig.from_pretrained(folder)
    complete(config)
    with merging_with(**options):
        if dequantize or getattr(config, "quantization_config", None) is None:
            report = merge_dense(folder, adapter, out)
        else:
            model = model_class(config).from_pretrained(folder, device_map=device_map)
            merged = attach(model, adapter).merge_and_unload()
            merged.save_pretrained(out)
            report = merged.qhub_merge_report
    copy_companions(folder, out)
    (out / _REPORT).write_text(json.dumps(report.as_data(), indent=1) + "\n", encoding="utf-8")
    return report


def attach(model: Any, adapter: str) -> Any:
    """Return ``model`` with the adapter of the folder or repository ``adapter`` on it.

    Raises :class:`CheckpointError` for one that does not fit the model, or is none, :class:`UnsupportedError` for one
    that cannot be merged.
    """
    import peft

    try:
        adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"the adapter {adapter} cannot be put on this {type(model).__name__}: {error}. Name the model that it was "
            "trained on"
        ) from error
    _check_weights(adapted, adapter)
    return adapted


def _check_weights(adapted: Any, adapter: str) -> None:
    if not hasattr(adapted, "merge_and_unload"):
        raise UnsupportedError(
            f"the adapter {adapter} changes no weights (it is a prompt, or the like), so there is nothing to merge: "
            "keep it on top of the model"
        )
