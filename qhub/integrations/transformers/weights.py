"""Which weights of a transformers model could be quantized, and the layers that will hold them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qhub.modules import QuantLinear
from qhub.plan import WeightInfo
from qhub.tensor import QuantizedTensor

__all__ = [
    "find_weights",
    "memory_footprint",
    "put_layers",
    "set_tensor",
    "undo_layers",
    "untie_head",
]


def find_weights(model: Any, embeddings: bool = False) -> dict[str, WeightInfo]:
    """Return every weight that a method may quantize, by parameter name: linear layers and fused experts.

    ``embeddings``: the input embeddings too; an output head that is tied to them is then part of them.
    """
    from transformers.pytorch_utils import Conv1D

    found: dict[str, WeightInfo] = {}
    table = model.get_input_embeddings() if embeddings else None
    for prefix, module in model.named_modules():
        if module is table and isinstance(module, nn.Embedding):
            name, weight = _join(prefix, "weight"), module.weight
            found[name] = WeightInfo(name, weight.shape[0], weight.shape[1], weight.dtype, "embedding")
        elif type(module) in (nn.Linear, QuantLinear) or _is_linear(module.__class__):
            name, weight = _join(prefix, "weight"), module.weight
            found[name] = WeightInfo(name, module.out_features, module.in_features, weight.dtype)
        elif isinstance(module, Conv1D):
            name, weight = _join(prefix, "weight"), module.weight
            found[name] = WeightInfo(name, weight.shape[1], weight.shape[0], weight.dtype, "conv1d")
        elif _holds_experts(module):
            # transformers' use_experts_implementation notes on each module whether it keeps weights as (in, out).
            transposed = bool(getattr(module, "is_transposed", False))
            for local, weight in module.named_parameters(recurse=False):
                if weight.ndim != 3:
                    continue
                name = _join(prefix, local)
                n, k = (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])
                found[name] = WeightInfo(name, n, k, weight.dtype, "experts", weight.shape[0], transposed)
    return found


@cache
def _is_linear(cls: Any) -> bool:
    """Return whether a model's own subclass of ``nn.Linear`` computes what that does (Falcon's, but for rounding).

    Found by trying: a small one is made, and its output compared. Torch's own subclasses are not tried, as others read
    their weights.
    """
    if not issubclass(cls, nn.Linear) or cls.__module__.startswith(("torch.", "qhub.", "peft.")):
        return False
    if {"__init__", "weight", "bias"} & set(vars(cls)):
        return False
    # In the middle of loading: another default device and dtype, weights left as the memory was, and a random state
    # that is not ours.
    with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        trial = cls(4, 3).float()
        trial.weight.copy_(torch.linspace(-2, 2, 12).reshape(3, 4))
        trial.bias.copy_(torch.linspace(1, 2, 3))
        x = torch.linspace(-1, 1, 8, dtype=torch.float32).reshape(2, 4)
        try:
            found = trial(x)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
        expected = nn.functional.linear(x, trial.weight, trial.bias)
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


def _holds_experts(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") or "Experts" in type(module).__name__


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def put_layers(model: nn.Module, weights: Iterable[WeightInfo]) -> None:
    """Replace the linear layers of ``weights`` by hollow :class:`QuantLinear`; fused experts and embeddings keep
    their module."""
    for info in weights:
        parent, _, leaf = info.name.rpartition(".")
        if info.kind in ("experts", "embedding"):
            getattr(model.get_submodule(parent), leaf).requires_grad_(False)
            continue
        old = model.get_submodule(parent)
        layer = QuantLinear.hollow(info.in_features, info.out_features, getattr(old, "bias", None), info.dtype)
        layer.train(old.training)
        _take_over(layer, old)
        model.set_submodule(parent, layer)


def _take_over(layer: nn.Module, old: nn.Module) -> None:
    """Give ``layer`` what ``old`` holds besides weight and bias: the scales of a layer that stands for several."""
    for name, parameter in old.named_parameters(recurse=False):
        if name not in layer._parameters:
            layer.register_parameter(name, parameter)


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace the parameter or buffer ``name`` of ``model`` by ``value``; a parameter gets no gradients."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def untie_head(model: Any) -> dict[str, list[str]]:
    """Give output weights that are tied to the input embeddings of ``model``, on the meta device, tensors of their own.

    Returns their names by that of the embeddings; the config says from then on that nothing is tied.
    """
    table = model.get_input_embeddings().weight
    tied: dict[str, str] = model.all_tied_weights_keys
    source = next((name for name, parameter in model.named_parameters() if parameter is table), None)
    heads = [name for name, other in tied.items() if other == source]
    for name in heads:
        del tied[name]
        set_tensor(model, name, torch.empty_like(table, device="meta"))
    if not heads or source is None:
        return {}
    model.config.get_text_config(decoder=True).tie_word_embeddings = False
    return {source: heads}


def undo_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantized weight by its dense one in ``dtype``, and :class:`QuantLinear` by ``nn.Linear``."""
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, QuantizedTensor):
                dense = parameter.dequantize(dtype).contiguous()
                module.register_parameter(name, nn.Parameter(dense, requires_grad=False))
        if type(module) is QuantLinear:
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight, plain.bias = module.weight, module.bias
            _take_over(plain, module)
            plain.train(module.training)
            if hasattr(module, "_hf_hook"):
                from accelerate.hooks import add_hook_to_module, remove_hook_from_module

                hook = module._hf_hook
                remove_hook_from_module(module)
                add_hook_to_module(plain, hook)
            model.set_submodule(prefix, plain)


def memory_footprint(model: Any, original: Any, return_buffers: bool = True) -> int:
    """Return the bytes that the model's tensors take; quantized weights count packed.

    ``original`` is transformers' own method, which would count a quantized weight as if it were dense.
    """
    total = original(model, return_buffers=return_buffers)
    for parameter in model.parameters():
        if isinstance(parameter, QuantizedTensor):
            total += parameter.nbytes - parameter.numel() * parameter.element_size()
    return total
