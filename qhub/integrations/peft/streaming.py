"""Merges an adapter into a dense checkpoint block by block: no more than one block is in memory as floats."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import core_model_loading as host

from qhub.calibration.stacks import find_stacks
from qhub.heap import trim
from qhub.integrations.peft import layers, models
from qhub.integrations.peft.observing import Observed, observing
from qhub.integrations.transformers import companions
from qhub.integrations.transformers.folders import model_class, weight_files
from qhub.integrations.transformers.memory import Releaser
from qhub.integrations.transformers.saving import name_shards, publish, write_model_config
from qhub.integrations.transformers.streaming import open_on_disk
from qhub.merging import MergedLayer, MergeReport
from qhub.tensor import QuantizedTensor

__all__ = ["merge_dense"]


def merge_dense(folder: Path, adapter: str, out: Path) -> MergeReport:
    """Write the model in ``folder``, dequantized if it is quantized, with ``adapter`` merged, to ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.merging-", dir=out.parent))
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        companions.complete(config)
        quantized = getattr(config, "quantization_config", None) is not None
        source = _Packed(folder) if quantized else _Files(folder, staging / "offload")
        report = _merge(source, adapter, staging)
        shutil.rmtree(staging / "offload", ignore_errors=True)
        publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


class _Packed:
    """Is a quantized checkpoint, in memory as it is."""

    def __init__(self, folder: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        self.model = self.origin = model_class(config).from_pretrained(folder)

    def fetch(self, names: list[str]) -> None:
        """Bring the weights ``names`` in; they are here already."""

    def release(self) -> None:
        """Give back what the last block took."""
        trim()


class _Files:
    """Is a dense checkpoint on the disk, with a model whose weights take no memory until they are fetched.

    ``model``: takes the adapter; its weights are one number each, spread out. ``origin``: knows how transformers
    renamed the checkpoint's entries.
    """

    def __init__(self, folder: Path, offload: Path) -> None:
        self._releaser = Releaser(weight_files(folder))
        self.origin = open_on_disk(folder, "auto", offload, torch.device("cpu"))
        self.model = _hollow(self.origin)
        # By the names of the model without adapters.
        self._owners = dict(self.model.named_modules())

    def fetch(self, names: list[str]) -> None:
        """Bring the weights ``names`` in."""
        from transformers.integrations.accelerate import load_offloaded_parameter

        made: dict[int, nn.Parameter] = {}
        for name in names:
            owner, _, leaf = name.rpartition(".")
            held = _leaf(self.origin, name)
            if id(held) not in made:
                value = load_offloaded_parameter(self.origin, name) if held.device.type == "meta" else held
                made[id(held)] = nn.Parameter(value.detach().clone(), requires_grad=False)
            self._owners[owner]._parameters[leaf] = made[id(held)]

    def release(self) -> None:
        """Give the pages of the files back."""
        self._releaser.release()


def _hollow(origin: Any) -> Any:
    """Return a model like ``origin`` whose parameters share one number each."""
    with torch.device("meta"):
        model = type(origin)(origin.config)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        if id(parameter) not in made:
            dtype = _leaf(origin, name).dtype
            spread = torch.zeros((), dtype=dtype).expand(parameter.shape)
            made[id(parameter)] = nn.Parameter(spread, requires_grad=False)
        model.get_submodule(owner)._parameters[leaf] = made[id(parameter)]
    model.tie_weights()
    return model.eval()


def _leaf(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    found = model.get_submodule(owner)._parameters[leaf]
    assert found is not None
    return found


def _merge(source: _Packed | _Files, adapter: str, staging: Path) -> MergeReport:
    from qhub.integrations.peft.merging import attach

    model: Any = source.model
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    stacks = find_stacks(model, [name for name, parameter in model.named_parameters() if parameter.ndim >= 2])
    blocks = [block for stack in stacks for block in stack.blocks]
    units = [[name for name in names if name.startswith(f"{block}.")] for block in blocks]
    inside = {name for unit in units for name in unit}
    units.append([name for name in names if name not in inside])
    tuner: Any = attach(model, adapter).base_model
    found = models.adapted_layers(tuner.model)
    for layer, name in found.items():
        layers.check(layer, None, name)
    sums = models.new_checksums(tuner, found, None)
    report = MergeReport(adapters=list(sums), notes=["the merged weights are dense and exact"])
    shards: dict[Path, list[str]] = {}
    with observing(Observed(names=found, dense=True)):
        for number, (block, unit) in enumerate(zip([*blocks, None], units, strict=True)):
            source.fetch(unit)
            for name in _unload(tuner, block, blocks):
                report.layers.append(MergedLayer(f"{name}.weight", "dense", False, 0.0, 0.0, 0))
            entries = _entries(source.origin, tuner.model, unit)
            file = staging / f"shard-{number:05d}.safetensors"
            save_file(entries, file, metadata={"format": "pt"})
            shards[file] = list(entries)
            _drop(tuner.model, unit)
            source.release()
    name_shards(staging, shards)
    models.note_merged(model, sums)
    _write_config(model, staging)
    return report


def _unload(tuner: Any, block: str | None, blocks: list[str]) -> list[str]:
    """Merge and unload the tuner layers in ``block``, or those in none; return their names."""
    from peft.utils import _get_submodules

    done: list[str] = []
    for name, module in list(tuner.model.named_modules()):
        inside = [one for one in blocks if name == one or name.startswith(f"{one}.")]
        if inside != ([] if block is None else [block]) or any(name.startswith(f"{one}.") for one in done):
            continue
        if not hasattr(module, "unload_and_optionally_merge_module") and not hasattr(module, "base_layer"):
            continue
        parent, _, local = _get_submodules(tuner.model, name)
        layer: Any = module
        if hasattr(layer, "unload_and_optionally_merge_module"):
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            layer.merge()
            plain = layer.get_base_layer()
        tuner._replace_module(parent, local, plain, layer)
        done.append(name)
    return done


def _entries(origin: Any, model: Any, names: list[str]) -> dict[str, Tensor]:
    """Return the file entries of the weights ``names`` and the buffers beside them, under the checkpoint's names."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    owners = {name.rpartition(".")[0] for name in names}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in names and not (name.rpartition(".")[0] in owners and not isinstance(value, nn.Parameter)):
            continue
        state[name] = value.dequantize() if isinstance(value, QuantizedTensor) else value.detach()
    state = remove_tied_weights_from_state_dict(state, model)
    entries = host.revert_weight_conversion(origin, state)
    return {name: tensor.cpu().contiguous() for name, tensor in entries.items()}


def _drop(model: Any, names: list[str]) -> None:
    for name in names:
        owner, _, leaf = name.rpartition(".")
        held = model.get_submodule(owner)._parameters
        held[leaf] = nn.Parameter(held[leaf].detach().to("meta"), requires_grad=False)


def _write_config(model: Any, staging: Path) -> None:
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    companions.forget(config)
    write_model_config(model, config, staging)
