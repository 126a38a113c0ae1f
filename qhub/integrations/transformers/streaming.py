"""Quantizes a folder into a folder with one block in memory at a time.

The model is loaded as transformers loads a model that lies on the disk: whatever it does to a checkpoint (renaming,
merging experts) is done by it. A block is read when its turn comes, and its result written before the next is read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qhub.calibration import CalibrationReport, sharing
from qhub.calibration.engine import Progress
from qhub.calibration.journal import JOURNAL, Journal, fingerprint
from qhub.calibration.stacks import find_stacks
from qhub.config import method_of
from qhub.errors import UnsupportedError
from qhub.integrations.transformers import install
from qhub.integrations.transformers.calibrating import calibrate, options_of, samples_for
from qhub.integrations.transformers.folders import local_folder, model_class, weight_files
from qhub.integrations.transformers.memory import Releaser
from qhub.integrations.transformers.workshops import FolderWorkshop

__all__ = ["Streamed", "open_on_disk", "quantize_folder"]


@dataclass(frozen=True)
class Streamed:
    """Is what :func:`quantize_folder` leaves.

    ``model``: without weights, and in all processes but the first without a quantizer. ``resumed``: how many blocks an
    earlier run had finished.
    """

    model: Any
    report: CalibrationReport
    resumed: int


def quantize_folder(
    source: str,
    config: Any,
    out: Path,
    *,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    progress: Progress | None = None,
    keep_work: bool = False,
    anew: bool = False,
) -> Streamed:
    """Quantize the model ``source`` (a folder or a repository) into the folder ``out``, streaming.

    ``options``: fields of :class:`CalibrationOptions` that win over what ``config`` says. ``dtype``: of what stays
    unquantized; ``"auto"``: as in the checkpoint. What is finished lies in ``<out>.partial`` until the end: the same
    call goes on there after a kill. ``keep_work``: leave that folder in place. ``anew``: throw away what another run
    left there; otherwise that raises :class:`CheckpointError`.
    """
    # Before the quantizer's module is imported: transformers' registry of quantizers, at the end of its own import,
    # makes qhub import that module.
    install()
    from qhub.integrations.transformers.quantizer import quantizer_for

    _join_processes()
    method = method_of(config)
    work = out.with_name(out.name + ".partial")
    chosen = options_of(method, config, **dict(options or {}))
    device = chosen.compute_device()
    folder = local_folder(source, weights=True)
    files = weight_files(folder)
    # Before the files are mapped: pages that others mapped earlier are not its to give back.
    releaser = Releaser(files)
    try:
        model = open_on_disk(folder, dtype, work / f"offload-{sharing.rank()}", device)
        quantizer = quantizer_for(method, False)(config, pre_quantized=False)
        quantizer.plan_for(model)
        if not quantizer.calibrates:
            raise UnsupportedError(
                f"{method} needs no data for these settings: load it with from_pretrained, and save it"
            )
        samples, warnings = samples_for(model, chosen)
    except BaseException:
        if not (work / JOURNAL).exists():
            shutil.rmtree(work, ignore_errors=True)
        raise
    facts = {
        "model": sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files),
        "config": config.to_dict(),
        "plan": sorted((name, repr(plan)) for name, plan in quantizer.plan.items()),
        "samples": fingerprint({"samples": [_plain(sample) for sample in samples]}),
        "options": repr((chosen.batch_size, chosen.sequential, chosen.dtype, chosen.min_tokens, device.type)),
        "versions": (torch.__version__, transformers.__version__),
        "dtype": str(model.dtype),
        "processes": sharing.processes(),
    }
    if sharing.rank() == 0:
        Journal(work, facts, anew)
    sharing.barrier()
    workshop = FolderWorkshop(model, quantizer, Journal(work, facts), releaser)
    report = calibrate(model, quantizer, chosen, workshop, progress, samples)
    report.warnings[:0] = warnings
    quantizer.calibration = report
    if sharing.rank() == 0:
        workshop.assemble(out, report)
        if not keep_work:
            shutil.rmtree(work)
    sharing.barrier()
    return Streamed(model, report, workshop.resumed)


def _join_processes() -> None:
    """Join the other processes, where ``accelerate launch`` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState()


def open_on_disk(folder: Path, dtype: Any, offload: Path, device: torch.device) -> Any:
    """Return the model of ``folder`` with its blocks on the disk, everything else on ``device``.

    Raises :class:`UnsupportedError` for a model without a list of blocks.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = model_class(config)
    with torch.device("meta"):
        hollow = cls(config) if not hasattr(cls, "from_config") else cls.from_config(config)
    stacks = find_stacks(hollow, [name for name, p in hollow.named_parameters() if p.ndim >= 2])
    if not stacks:
        raise UnsupportedError(f"{folder} has no list of blocks to stream: load it with from_pretrained instead")
    places = _places(hollow, "", {name for stack in stacks for name in stack.blocks}, str(device))
    del hollow
    shutil.rmtree(offload, ignore_errors=True)
    return cls.from_pretrained(folder, dtype=dtype, device_map=places, offload_folder=str(offload))


def _places(module: nn.Module, name: str, blocks: Collection[str], device: str) -> dict[str, str]:
    """Return a device map that puts ``blocks`` on the disk and all else on ``device``."""
    if name in blocks:
        return {name: "disk"}
    lead = f"{name}." if name else ""
    if not any(block.startswith(lead) for block in blocks):
        return {name: device}
    places = {lead + local: device for local, _ in module.named_parameters(recurse=False)}
    for local, child in module.named_children():
        places |= _places(child, lead + local, blocks, device)
    return places


def _plain(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a sample: every token, and the sums of what is no token."""
    return {
        name: (list(value.shape), value.tolist() if not value.is_floating_point() else float(value.double().sum()))
        for name, value in sample.items()
        if isinstance(value, Tensor)
    }
