"""Quantizes a folder into a folder with one block in memory at a time.

The model is loaded as transformers loads a model that lies on the disk: whatever it does to a checkpoint (renaming,
merging experts) is done by it. A block is read when its turn comes, and its result written before the next is read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from qhub.calibration import CalibrationReport, sharing
from qhub.calibration.block import BlockWork
from qhub.calibration.engine import Progress
from qhub.calibration.journal import JOURNAL, Journal, fingerprint
from qhub.calibration.products import Key
from qhub.calibration.report import LayerReport
from qhub.calibration.stacks import find_stacks
from qhub.config import method_of
from qhub.errors import UnsupportedError
from qhub.integrations.model_card import write_card
from qhub.integrations.transformers import install
from qhub.integrations.transformers.calibrating import calibrate, options_of, samples_for
from qhub.integrations.transformers.folders import local_folder, model_class, weight_files
from qhub.integrations.transformers.memory import Releaser
from qhub.integrations.transformers.saving import entries_of_model, publish, write_companion
from qhub.integrations.transformers.weights import put_layers
from qhub.layouts import Layout, Transform
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

if TYPE_CHECKING:
    from qhub.integrations.transformers.quantizer import PluginQuantizer

__all__ = ["Streamed", "quantize_folder"]


class Streamed:
    """Is what :func:`quantize_folder` leaves: ``model`` without weights, its ``quantizer`` and the ``report``."""

    def __init__(self, model: Any, quantizer: PluginQuantizer, report: CalibrationReport, resumed: int) -> None:
        self.model = model
        self.quantizer = quantizer
        self.report = report
        self.resumed = resumed


def quantize_folder(
    source: str,
    config: Any,
    out: Path,
    *,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    progress: Progress | None = None,
    keep_work: bool = False,
) -> Streamed:
    """Quantize the model ``source`` (a folder or a repository) into the folder ``out``, streaming.

    ``options``: fields of :class:`CalibrationOptions` that win over what ``config`` says. ``dtype``: of what stays
    unquantized; ``"auto"``: as in the checkpoint. What is finished lies in ``<out>.partial`` until the end: the same
    call goes on there after a kill. ``keep_work``: leave that folder in place. Raises :class:`CheckpointError` when it
    belongs to another run.
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
    try:
        model, files = _open(source, dtype, work / f"offload-{sharing.rank()}", device)
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
        "options": repr((chosen.batch_size, chosen.sequential, chosen.dtype, chosen.min_tokens, str(device))),
        "versions": (torch.__version__, transformers.__version__),
        "dtype": str(model.dtype),
        "processes": sharing.processes(),
    }
    if sharing.rank() == 0:
        Journal(work, facts)
    sharing.barrier()
    workshop = _FolderWorkshop(model, quantizer, Journal(work, facts), Releaser(files))
    report = calibrate(
        model, quantizer.planned_infos(), quantizer.plan, quantizer.quantization, chosen, workshop, progress, samples
    )
    report.warnings[:0] = warnings
    quantizer.calibration = report
    if sharing.rank() == 0:
        workshop.assemble(out, report)
        if not keep_work:
            shutil.rmtree(work)
    sharing.barrier()
    return Streamed(model, quantizer, report, workshop.resumed)


def _join_processes() -> None:
    """Join the other processes, where ``accelerate launch`` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState()


def _open(source: str, dtype: Any, offload: Path, device: torch.device) -> tuple[Any, list[Path]]:
    """Return the model with its blocks on the disk, everything else on ``device``, and the checkpoint's files."""
    folder = local_folder(source)
    files = weight_files(folder)
    cls = model_class(source)
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        hollow = cls(config) if not hasattr(cls, "from_config") else cls.from_config(config)
    stacks = find_stacks(hollow, [name for name, p in hollow.named_parameters() if p.ndim >= 2])
    if not stacks:
        raise UnsupportedError(f"{source} has no list of blocks to stream: load it with from_pretrained instead")
    places = _places(hollow, "", {name for stack in stacks for name in stack.blocks}, str(device))
    del hollow
    shutil.rmtree(offload, ignore_errors=True)
    model = cls.from_pretrained(folder, dtype=dtype, device_map=places, offload_folder=str(offload))
    return model, files


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


class _FolderWorkshop:
    """Reads blocks from the disk, keeps their results in the journal, and assembles the checkpoint from it."""

    def __init__(self, model: Any, quantizer: PluginQuantizer, journal: Journal, releaser: Releaser) -> None:
        self._model = model
        self._quantizer = quantizer
        self._journal = journal
        self._releaser = releaser
        self._blocks: list[str] = []
        self._restored: set[str] = set()
        self._hidden: dict[str, torch.dtype] = {}

    @property
    def resumed(self) -> int:
        """Return how many blocks an earlier run had finished."""
        return len(self._restored)

    def open(self, name: str, module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        from accelerate.hooks import remove_hook_from_submodules
        from transformers.integrations.accelerate import load_offloaded_parameter

        self._blocks.append(name)
        if not name:
            return
        found: dict[str, Tensor] = {}
        for local, _ in (*module.named_parameters(), *module.named_buffers()):
            parameter = _leaf(module, local)
            if parameter.device.type == "meta":
                found[local] = load_offloaded_parameter(self._model, f"{name}.{local}")
        remove_hook_from_submodules(module)
        for local, tensor in found.items():
            parent, _, leaf = local.rpartition(".")
            owner = module.get_submodule(parent)
            if leaf in owner._parameters:
                self._hidden[f"{name}.{local}"] = owner._parameters[leaf].dtype  # type: ignore[union-attr]
                # A copy of its own: what the file maps is given back, and must not be written into.
                dense = tensor.to(device, dtype or self._hidden[f"{name}.{local}"], copy=True)
                owner._parameters[leaf] = nn.Parameter(dense, requires_grad=False)
            else:
                owner._buffers[leaf] = tensor.to(device, copy=True)
        for owner in module.modules():
            for leaf, buffer in owner._buffers.items():
                owner._buffers[leaf] = None if buffer is None else buffer.to(device)
        self._releaser.release()

    def finish(self, name: str, module: nn.Module, tensors: Mapping[str, QuantizedTensor], work: BlockWork) -> None:
        if name not in self._restored and sharing.rank() == 0:
            self._journal.write(name or "outside", *self._packed(name, module, work))
        sharing.barrier()
        if name:
            for owner in module.modules():
                for leaf, parameter in owner._parameters.items():
                    if parameter is not None:
                        owner._parameters[leaf] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        self._releaser.release()

    def _packed(self, name: str, module: nn.Module, work: BlockWork) -> tuple[dict[str, Tensor], Any]:
        """Return what the journal keeps: the parts of each quantized matrix, and the block's other parameters."""
        tensors = {f"{key}::{part}": t for key, (_, parts) in work.parts.items() for part, t in parts.items()}
        lead = f"{name}." if name else ""
        for local, parameter in module.named_parameters():
            full = lead + local
            if full not in work.plans and full in self._hidden:
                tensors[f"{full}::dense"] = parameter.data.to(self._hidden[full])
        matrices = {str(key): (key.name, key.expert) for key in work.parts}
        mine = set(matrices)
        layers = [vars(layer) for layer in work.report.layers if layer.name in mine]
        return tensors, {"matrices": matrices, "layers": layers}

    def restore(self, name: str, module: nn.Module, work: BlockWork) -> bool:
        if not self._journal.finished(name or "outside"):
            return False
        tensors, note = self._journal.read(name or "outside")
        for text, (weight, expert) in note["matrices"].items():
            key = Key(weight, expert)
            target = work.matrix(key)
            parts = {n.partition("::")[2]: t.to(target.device) for n, t in tensors.items() if n.startswith(f"{text}::")}
            layout = _with_parts(self._quantizer.plan[weight].layout, parts)
            layout.validate(parts)
            work.parts[key] = layout, parts
            target.copy_(layout.dequantize(parts))
        lead = f"{name}." if name else ""
        for local, parameter in module.named_parameters():
            dense = tensors.get(f"{lead}{local}::dense")
            if dense is not None:
                parameter.data.copy_(dense)
        work.report.layers += [LayerReport(**layer) for layer in note["layers"]]
        self._restored.add(name)
        return True

    # -- the checkpoint ----------------------------------------------------------------------------------------------

    def assemble(self, out: Path, report: CalibrationReport) -> None:
        """Write the checkpoint from the journal, block by block, and put it in place at the end."""
        model, quantizer = self._model, self._quantizer
        fmt = registry.call(quantizer.method, "qhub_format", config=quantizer.quantization_config)
        staging = self._journal.folder / "checkpoint"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        put_layers(model, quantizer.planned_infos().values())
        shards: dict[Path, list[str]] = {}
        for number, block in enumerate([*self._blocks, None]):
            if block is not None:
                names = self._take(block)
            else:
                # What lies in no block was in memory all the time.
                names = {n for n, p in model.state_dict(keep_vars=True).items() if p.device.type != "meta"}
            entries = entries_of_model(model, fmt, only=names)
            if entries:
                file = staging / f"shard-{number:05d}.safetensors"
                contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in entries.items()}
                save_file(contiguous, file, metadata={"format": "pt"})
                shards[file] = list(entries)
            if block is not None:
                self._drop(names)
            self._releaser.release()
        self._name(staging, shards)
        self._configs(staging, report)
        publish(staging, out)

    def _take(self, block: str) -> set[str]:
        """Put the finished tensors of ``block`` into the model; return their names."""
        quantizer = self._quantizer
        tensors, note = self._journal.read(block or "outside")
        parts: dict[str, dict[int | None, dict[str, Tensor]]] = {}
        for text, (weight, expert) in note["matrices"].items():
            own = {n.partition("::")[2]: t for n, t in tensors.items() if n.startswith(f"{text}::")}
            parts.setdefault(weight, {})[expert] = own
        infos, names = quantizer.planned_infos(), set()
        for weight in parts:

            def built(expert: int | None, weight: str = weight) -> QuantizedTensor:
                own, plan = parts[weight][expert], quantizer.plan[weight]
                layout = _with_parts(plan.layout, own)
                return quantizer.quantization.build(layout, own, infos[weight].dtype, plan.compute_dtype)

            _set(self._model, weight, quantizer.quantization.assemble(infos[weight], built))
            names.add(weight)
        for name, tensor in tensors.items():
            full, _, kind = name.rpartition("::")
            if kind == "dense":
                _set(self._model, full, tensor)
                names.add(full)
        return names

    def _drop(self, names: set[str]) -> None:
        for name in names:
            # A quantized one still knows its layout there, which the model card counts.
            _set(self._model, name, _leaf(self._model, name).detach().to("meta"))

    def _name(self, staging: Path, shards: Mapping[Path, list[str]]) -> None:
        """Give the shards their final names, and write the index if there are several."""
        total = sum(file.stat().st_size for file in shards)
        if len(shards) == 1:
            next(iter(shards)).rename(staging / "model.safetensors")
            return
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": {}}
        for number, (file, names) in enumerate(shards.items(), 1):
            final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file.rename(staging / final)
            index["weight_map"] |= dict.fromkeys(names, final)
        index["weight_map"] = dict(sorted(index["weight_map"].items()))
        (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _configs(self, staging: Path, report: CalibrationReport) -> None:
        model = self._model
        model.config.quantization_config = self._quantizer.quantization_config
        model.hf_quantizer = self._quantizer
        model.is_quantized = True
        # The class that save_pretrained would name.
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.save_pretrained(staging)
        if model.can_generate():
            model.generation_config.save_pretrained(staging)
        write_companion(model, staging)
        write_card(model, staging)
        (staging / "calibration.json").write_text(json.dumps(report.as_data(), indent=1) + "\n")


def _with_parts(layout: Layout, parts: Mapping[str, Tensor]) -> Layout:
    """Return the planned ``layout`` as the engine refined it: with an input scale where there is one."""
    import dataclasses

    scaled = any(transform.kind == "scale" and transform.side == "in" for transform in layout.transforms)
    if "in_scale" in parts and not scaled:
        return dataclasses.replace(layout, transforms=(Transform("scale", "in"), *layout.transforms))
    return layout


def _leaf(module: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    found = owner._parameters.get(leaf)
    return found if found is not None else owner._buffers[leaf]  # type: ignore[return-value]


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _plain(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a sample: every token, and the sums of what is no token."""
    return {
        name: (list(value.shape), value.tolist() if not value.is_floating_point() else float(value.double().sum()))
        for name, value in sample.items()
        if isinstance(value, Tensor)
    }
