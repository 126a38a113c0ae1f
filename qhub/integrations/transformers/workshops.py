"""Brings the blocks of a model in and takes their results away: one for models in memory, one from folder to folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qhub.calibration import CalibrationReport, sharing
from qhub.calibration.block import BlockWork
from qhub.calibration.journal import Journal
from qhub.calibration.products import Key
from qhub.calibration.report import LayerReport
from qhub.integrations.model_card import write_card
from qhub.integrations.transformers.memory import Releaser
from qhub.integrations.transformers.recording import record_config
from qhub.integrations.transformers.saving import (
    entries_of_model,
    name_shards,
    publish,
    write_companion,
    write_model_config,
)
from qhub.integrations.transformers.weights import put_layers, set_tensor
from qhub.layouts import Layout
from qhub.layouts.transforms import with_input_scale
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

if TYPE_CHECKING:
    from qhub.integrations.transformers.quantizer import PluginQuantizer

__all__ = ["FolderWorkshop", "LiveWorkshop"]


class LiveWorkshop:
    """Works on a model in memory: blocks go to the compute device and come back quantized."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before: dict[str, tuple[torch.device, torch.dtype]] = {}

    def open(self, name: str, module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        if not name:
            return
        for local, parameter in module.named_parameters():
            self._before[f"{name}.{local}"] = parameter.device, parameter.dtype
            parameter.data = parameter.data.to(device, dtype or parameter.dtype)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)

    def finish(self, name: str, module: nn.Module, tensors: Mapping[str, QuantizedTensor], work: BlockWork) -> None:
        # Layers outside the blocks were never moved.
        homes = {weight: self._before[weight][0] if name else tensor.device for weight, tensor in tensors.items()}
        put_layers(self.model, (work.infos[weight] for weight in tensors))
        for weight, tensor in tensors.items():
            set_tensor(self.model, weight, tensor.to(homes[weight]))
        if not name:
            return
        for local, parameter in module.named_parameters():
            before = self._before.get(f"{name}.{local}")
            if before is not None and not isinstance(parameter, QuantizedTensor):
                parameter.data = parameter.data.to(*before)
        home = next((place for place, _ in self._before.values()), None)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(home) if home is not None else buffer.data
        self._before.clear()

    def restore(self, name: str, module: nn.Module, work: BlockWork) -> bool:
        return False


class FolderWorkshop:
    """Reads blocks from the disk, keeps their results in the journal, and assembles the checkpoint from it."""

    def __init__(self, model: Any, quantizer: PluginQuantizer, journal: Journal, releaser: Releaser) -> None:
        self._model = model
        self._quantizer = quantizer
        self._journal = journal
        self._releaser = releaser
        self._blocks: list[str] = []
        self._restored: set[str] = set()
        # Parameters of the open block, by name, with the dtype they are kept in.
        self._dense: dict[str, torch.dtype] = {}

    @property
    def resumed(self) -> int:
        """Return how many blocks an earlier run had finished."""
        return len(self._restored)

    def open(self, name: str, module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        from accelerate.hooks import remove_hook_from_submodules
        from transformers.integrations.accelerate import load_offloaded_parameter

        self._blocks.append(name)
        self._dense = {}
        if not name:
            self._own_outside()
            return
        found: dict[str, Tensor] = {}
        for local, _ in (*module.named_parameters(), *module.named_buffers()):
            parameter = _leaf(module, local)
            if parameter.device.type == "meta":
                found[local] = load_offloaded_parameter(self._model, f"{name}.{local}")
        remove_hook_from_submodules(module)
        parameters = {local for local, _ in module.named_parameters()}
        for local, tensor in found.items():
            own = None
            if local in parameters:
                self._dense[f"{name}.{local}"] = _leaf(module, local).dtype
                own = dtype or _leaf(module, local).dtype
            # A copy of its own: what the file maps is given back, and must not be written into.
            set_tensor(module, local, tensor.to(device, own or tensor.dtype, copy=True))
        for owner in module.modules():
            for leaf, buffer in owner._buffers.items():
                owner._buffers[leaf] = None if buffer is None else buffer.to(device)
        self._releaser.release()

    def _own_outside(self) -> None:
        """Take the parameters outside the blocks out of the files, as scales may be folded into them; embeddings, tied
        or not, take none."""
        ties = getattr(self._model, "all_tied_weights_keys", {})
        embedding = self._model.get_input_embeddings()
        for name, parameter in self._model.named_parameters():
            tied = name in ties or name in ties.values()
            if (
                parameter.device.type != "meta"
                and not tied
                and (embedding is None or parameter is not embedding.weight)
            ):
                self._dense[name] = parameter.dtype
                parameter.data = parameter.data.clone()

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
            if full not in work.plans and full in self._dense:
                tensors[f"{full}::dense"] = parameter.data.to(self._dense[full])
        matrices = {str(key): (key.name, key.expert) for key in work.parts}
        mine = set(matrices)
        layers = [vars(layer) for layer in work.report.layers if layer.name in mine]
        return tensors, {"matrices": matrices, "layers": layers}

    def restore(self, name: str, module: nn.Module, work: BlockWork) -> bool:
        if not self._journal.finished(name or "outside"):
            return False
        tensors, note = self._journal.read(name or "outside")
        for key, (layout, stored) in self._matrices(tensors, note).items():
            target = work.matrix(key)
            parts = {part: tensor.to(target.device) for part, tensor in stored.items()}
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

    def _matrices(self, tensors: Mapping[str, Tensor], note: Any) -> dict[Key, tuple[Layout, dict[str, Tensor]]]:
        """Return layout and parts of each matrix that the journal kept in ``tensors``."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            matrix, _, part = name.rpartition("::")
            parts.setdefault(matrix, {})[part] = tensor
        found = {}
        for text, (weight, expert) in note["matrices"].items():
            layout, own = self._quantizer.plan[weight].layout, parts[text]
            # The one thing that the engine adds to a plan.
            found[Key(weight, expert)] = (with_input_scale(layout) if "in_scale" in own else layout), own
        return found

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
            entries, metadata = entries_of_model(model, fmt, only=names)
            if entries:
                file = staging / f"shard-{number:05d}.safetensors"
                contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in entries.items()}
                save_file(contiguous, file, metadata={"format": "pt", **metadata})
                shards[file] = list(entries)
            if block is not None:
                self._drop(names)
            self._releaser.release()
        name_shards(staging, shards)
        self._configs(staging, report)
        publish(staging, out)

    def _take(self, block: str) -> set[str]:
        """Put the finished tensors of ``block`` into the model; return their names."""
        quantizer = self._quantizer
        tensors, note = self._journal.read(block or "outside")
        matrices = self._matrices(tensors, note)
        infos, names = quantizer.planned_infos(), set()
        for weight in {key.name for key in matrices}:

            def built(expert: int | None, weight: str = weight) -> QuantizedTensor:
                layout, parts = matrices[Key(weight, expert)]
                compute_dtype = quantizer.plan[weight].compute_dtype
                return quantizer.quantization.build(layout, parts, infos[weight].dtype, compute_dtype)

            set_tensor(self._model, weight, quantizer.quantization.assemble(infos[weight], built))
            names.add(weight)
        for name, tensor in tensors.items():
            full, _, kind = name.rpartition("::")
            if kind == "dense":
                set_tensor(self._model, full, tensor)
                names.add(full)
        return names

    def _drop(self, names: set[str]) -> None:
        for name in names:
            # A quantized one still knows its layout there, which the model card counts.
            set_tensor(self._model, name, _leaf(self._model, name).detach().to("meta"))

    def _configs(self, staging: Path, report: CalibrationReport) -> None:
        model = self._model
        model.config.quantization_config = self._quantizer.quantization_config
        model.hf_quantizer = self._quantizer
        model.is_quantized = True
        model.config.dtype = model.dtype
        record_config(model, self._quantizer)
        write_model_config(model, model.config, staging)
        write_companion(model, staging)
        write_card(model, staging)
        (staging / "calibration.json").write_text(json.dumps(report.as_data(), indent=1) + "\n")


def _leaf(module: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    found = owner._parameters.get(leaf)
    return found if found is not None else owner._buffers[leaf]  # type: ignore[return-value]
