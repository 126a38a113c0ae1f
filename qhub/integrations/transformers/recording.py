"""What stands beside the weights of a checkpoint: tensors that no model has a place for, and what its config must name.

Some formats keep scales of the key-value cache in the modules that fill it. A model knows nothing of them: they are
carried along, and written back under the keys that they came with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import core_model_loading as host

from qhub.formats import Format
from qhub.integrations.transformers.checkpoint import FileTensor
from qhub.integrations.transformers.weights import find_weights
from qhub.layouts import Layout
from qhub.tensor import QuantizedTensor

__all__ = ["record_config", "routers", "take_passengers"]

# Scales and zeros; what is larger belongs to the model.
_LARGEST = 1 << 20
# Linear layers that some models write as modules of their own, and that loaders look up as linear layers.
_ROUTER = re.compile(r"Router|Gating|Gate(?![a-z])")


def take_passengers(model: Any, headers: Mapping[str, FileTensor], fmt: Format) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, by key, that ``fmt`` carries along and that ``model`` has no place for.

    ``model`` is told that they are expected.
    """
    if not fmt.passengers:
        return {}
    own = model.state_dict()
    found = {}
    for key, header in headers.items():
        local = key.rpartition(".")[2]
        if local not in fmt.passengers or key in own or header.file.suffix != ".safetensors":
            continue
        if torch.Size(header.shape).numel() <= _LARGEST:
            with safe_open(header.file, framework="pt") as opened:
                found[key] = opened.get_tensor(key)
    if found:
        expected = {rf"^{re.escape(key)}$" for key in found}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *expected}
    return found


def record_config(model: Any, quantizer: Any) -> None:
    """Let the method of a ``model`` that ``quantizer`` quantized write into its config what files of it will hold."""
    if quantizer.spec.record is None:
        return
    stored: dict[str, Layout] = {}
    dense: list[str] = []
    for name, info in find_weights(model).items():
        parameter = model.get_parameter(name)
        planned = quantizer.plan.get(name)
        held = parameter.quant_layout if isinstance(parameter, QuantizedTensor) else None
        layout = held.in_plain_order() if held is not None else planned and planned.layout
        rows = -1 if info.transposed or info.kind == "conv1d" else -2
        for prefix, shape in _in_file(model, name):
            if layout is None:
                dense.append(prefix)
            else:
                stored[prefix] = layout.with_rows(shape[rows])
    quantizer.spec.record(quantizer.quantization_config, stored, [*dense, *routers(model)])


def routers(model: Any) -> list[str]:
    """Return the names, as in a checkpoint, of the modules of ``model`` that choose experts with a matrix of their own:
    loaders look them up as linear layers."""
    found = []
    for prefix, module in model.named_modules():
        weight = getattr(module, "weight", None)
        chooses = _ROUTER.search(type(module).__name__) and not isinstance(module, nn.Linear)
        if chooses and isinstance(weight, Tensor) and weight.ndim == 2:
            found += [name for name, _ in _in_file(model, f"{prefix}.weight")]
    return found


def _in_file(model: Any, name: str) -> Iterator[tuple[str, torch.Size]]:
    """Yield (module, shape) of the matrices that a checkpoint holds for the parameter ``name``."""
    hollow = torch.empty(model.get_parameter(name).shape, device="meta")
    for key, piece in host.revert_weight_conversion(model, {name: hollow}).items():
        yield key.removesuffix(".weight"), piece.shape
