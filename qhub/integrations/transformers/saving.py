"""From quantized weights to file entries, and a save that leaves the previous files whole whatever happens."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import core_model_loading as host

from qhub.errors import CheckpointError, PluginError, UnsupportedError
from qhub.formats import Format
from qhub.integrations.transformers.headers import sort_metadata
from qhub.integrations.transformers.recording import record_config
from qhub.layouts import Layout
from qhub.registry import registry
from qhub.sharding import QuantizedShard
from qhub.tensor import QuantizedTensor

__all__ = [
    "dtype_name",
    "entries_of_model",
    "matrices_of",
    "name_shards",
    "publish",
    "save_quantized",
    "write_model_config",
]

logger = logging.getLogger("qhub")

_WEIGHT_FILES = re.compile(r"(model|pytorch_model)(\.[\w-]+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def entries_of_model(
    model: Any, fmt: Format, original_names: bool = True, only: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return every tensor to write for ``model``: quantized weights as ``fmt`` lays them out, the rest as they are; and
    what ``fmt`` has the header say besides.

    ``only``: names of those to write, as in the model's state dictionary; None: all.

    ``original_names``: undo transformers' renamings and merges, so that fused experts are written one by one, as
    published checkpoints have them. An expert that cannot be cut out exactly is written under the fused parameter's own
    name.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    own = {name for name, _ in model.named_parameters()}
    state: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedTensor] = {}
    for name, value in model.state_dict().items():
        if only is not None and name not in only:
            continue
        if isinstance(getattr(value, "_local_tensor", None), QuantizedShard):
            raise UnsupportedError(
                f"{name} is sharded by FSDP: this process has a piece of it. Save the adapter, and for a quantized "
                "checkpoint load the model in one process; accelerator.get_state_dict(model) gathers the tensors"
            )
        if isinstance(value, QuantizedTensor):
            if name in own:
                quantized[name] = (value if value.device.type != "meta" else _offloaded(model, name)).in_plain_order()
        else:
            state[name] = value
    dense = list(state)
    state = remove_tied_weights_from_state_dict(state, model)
    result = host.revert_weight_conversion(model, state) if original_names else state
    written: set[int] = set()
    stored: dict[str, tuple[Layout, torch.dtype]] = {}
    for name, weight in quantized.items():
        whole = weight.ndim > 2 and fmt.always_stacks
        matrices = matrices_of(model, name, weight, original_names and not whole)
        if fmt.stacks and set(matrices) == {f"{name}.{index}" for index in range(len(matrices))}:
            stored[name] = weight.quant_layout, weight.dtype
            result |= _stacked(name, list(matrices.values()), fmt)
            continue
        for prefix, matrix in matrices.items():
            if matrix.transposed:
                matrix = matrix.t()  # type: ignore[assignment]
            stored[name if len(matrices) == 1 else f"{prefix}.weight"] = matrix.quant_layout, matrix.dtype
            for local, entry in fmt.pack(matrix.quant_layout, matrix.parts, matrix.dtype).items():
                # A table that many matrices share is one tensor in memory; safetensors wants each on its own.
                storage = entry.untyped_storage().data_ptr()
                result[f"{prefix}.{local}"] = entry.clone() if storage in written else entry
                written.add(storage)
    if only is None:
        result |= getattr(model.hf_quantizer, "passengers", {})
    return result, fmt.metadata(stored, dense)


def _stacked(name: str, matrices: list[QuantizedTensor], fmt: Format) -> dict[str, Tensor]:
    """Return the entries of all experts of the parameter ``name``, each in one tensor."""
    packed = []
    for matrix in matrices:
        plain = matrix.t() if matrix.transposed else matrix
        packed.append(fmt.pack(plain.quant_layout, plain.parts, plain.dtype))  # type: ignore[attr-defined]
    owner, _, leaf = name.rpartition(".")
    return {
        f"{owner}.{fmt.stack_lead}{leaf}{ending}": torch.stack([one[local] for one in packed])
        for ending, local in fmt.stacks.items()
        if local in packed[0]
    }


def _offloaded(model: Any, name: str) -> QuantizedTensor:
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(model, name)  # type: ignore[return-value]


def matrices_of(model: Any, name: str, weight: QuantizedTensor, original_names: bool) -> dict[str, QuantizedTensor]:
    """Return the 2-D matrices of ``weight`` by the prefix they are written under."""
    if original_names:
        reverted = host.revert_weight_conversion(model, {name: weight})
        if all(isinstance(value, QuantizedTensor) and value.ndim == 2 for value in reverted.values()):
            return {key.removesuffix(".weight"): value for key, value in reverted.items()}  # type: ignore[misc]
    if weight.ndim == 2:
        return {name.removesuffix(".weight"): weight}
    return {f"{name}.{index}": weight[index] for index in range(weight.shape[0])}  # type: ignore[misc]


def save_quantized(model: Any, original: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Save like transformers' own ``save_pretrained`` (``original``), but beside the target, and put the files in place
    at the end.

    A full disk, an exception or a kill before that leaves the previous files as they were. Also writes a model card,
    unless the folder has one that somebody wrote or edited. With ``push_to_hub`` the files are in place before the
    upload begins.
    """
    from qhub.integrations.hub import start_push
    from qhub.integrations.model_card import write_card

    target = Path(save_directory)
    if target.is_file():
        raise CheckpointError(f"cannot save to {target}: it is a file, not a folder")
    call = inspect.signature(original).bind(model, save_directory, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    # transformers saves the adapter alone when one is loaded, and that is what it should push.
    pushes_adapter = given["push_to_hub"] and getattr(model, "_hf_peft_config_loaded", False)
    if not given["is_main_process"] or pushes_adapter:
        return original(model, save_directory, *args, **kwargs)
    push = None
    if given["push_to_hub"]:
        push = start_push(model, **{"repo_id": target.absolute().name, "token": given["token"], **given["kwargs"]})
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
    try:
        record_config(model, model.hf_quantizer)
        write_card(model, staging, previous=target / "README.md")
        if registry.has(model.hf_quantizer.method, "qhub_save"):
            save_container(model, staging, given["max_shard_size"])
        else:
            # The entries are in their original names already when transformers gets them.
            given.update(save_directory=staging, push_to_hub=False, save_original_format=False)
            original(*call.args, **call.kwargs)
        for file in staging.glob("*.safetensors"):
            sort_metadata(file)
        write_companion(model, staging)
        written = [file.relative_to(staging) for file in staging.rglob("*") if file.is_file()]
        publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if push is not None:
        push.send(model, target, written)
    return None


def save_container(model: Any, folder: Path, max_shard_size: int | str) -> None:
    """Write the model into ``folder`` as its method's own kind of file, and beside it the config that names that."""
    quantizer = model.hf_quantizer
    config = quantizer.quantization_config
    try:
        files = registry.call(
            quantizer.method,
            "qhub_save",
            config=config,
            model=model,
            folder=folder,
            container=quantizer.container,
            max_shard_size=max_shard_size,
        )
    except PluginError as error:
        if isinstance(error.__cause__, OSError):
            # A full disk is no fault of the plugin.
            raise error.__cause__ from None
        raise
    described = copy.deepcopy(model.config)
    described.dtype = dtype_name(model.dtype)
    # transformers' name for the file, where its own config class has one.
    described.quantization_config = {**config.to_dict(), "gguf_file": files[0].name}
    write_model_config(model, described, folder)


def write_model_config(model: Any, config: Any, folder: Path) -> None:
    """Write ``config`` into ``folder``, with the class that save_pretrained would name, and the generation config."""
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def write_companion(model: Any, folder: Path) -> None:
    """Write the config once more where the method's own tools look for it, if they have a file or a key for it."""
    name, key = model.hf_quantizer.spec.companion, model.hf_quantizer.spec.config_key
    values = model.hf_quantizer.quantization_config.to_dict()
    if key is not None:
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        known = config.get(key) or {}
        own = {k: v for k, v in values.items() if k != "quant_method" and (v is not None or k in known)}
        config[key] = {**known, **own}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if name is not None:
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def name_shards(staging: Path, shards: Mapping[Path, list[str]]) -> None:
    """Give weight files in ``staging``, each with the names of its tensors, their final names, and write the index."""
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


def publish(staging: Path, target: Path) -> None:
    """Move the files of ``staging`` into ``target``, each replaced in one step, weights before the configs that
    describe them.

    Weight files of an earlier save that the new one does not have are removed at the end.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = sorted((f for f in staging.rglob("*") if f.is_file()), key=lambda f: (f.suffix in (".json", ".md"), f.name))
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    for file in files:
        place = target / file.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(0o644)
        file.replace(place)
    kept = {file.name for file in files}
    for old in target.iterdir():
        if old.is_file() and old.name not in kept and _WEIGHT_FILES.fullmatch(old.name):
            logger.info("removing %s: the new checkpoint does not have it", old)
            old.unlink()


def bits_per_weight(model: Any) -> tuple[float, int, int]:
    """Return (bits per weight of the quantized weights, their number, bytes of all parameters)."""
    packed = count = total = 0
    for parameter in model.parameters():
        if isinstance(parameter, QuantizedTensor):
            # As files hold them: an order of codes for a kernel may have room for rows that are not there.
            held = parameter.in_plain_order().nbytes
            packed += held
            count += parameter.numel()
            total += held
        else:
            total += parameter.numel() * parameter.element_size()
    return (8 * packed / count if count else 0.0), count, total


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
