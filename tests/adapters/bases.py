"""The models that the tuners are put on: one tiny Llama per method and layout, and a dense twin of each.

A twin holds the dequantized weights in plain ``nn.Linear`` layers that round their input where the layout does: what
arithmetic says an adapter on the quantized model gives, with nothing of qhub between the tuner and the numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from qhub.layouts import Layout
from qhub.registry import registry
from qhub.tensor import QuantizedTensor
from qhub.testing.conformance.calibrating import calibrate_with_few
from qhub.testing.conformance.models import build_config

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = 64

# Name of the column: values of the config, or a folder for a method that only loads.
BASES: dict[str, dict[str, Any] | Path] = {
    "bitsandbytes NF4": dict(
        quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes FP4": dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bitsandbytes int8": dict(quant_method="bitsandbytes", load_in_8bit=True),
    "hqq 4-bit": dict(quant_method="hqq", nbits=4, group_size=64, axis=1),
    "hqq 2-bit": dict(quant_method="hqq", nbits=2, group_size=16, axis=1),
    "gptq 4-bit act-order": dict(quant_method="gptq", bits=4, group_size=32, desc_act=True, sym=True),
    "gptq 3-bit asymmetric": dict(quant_method="gptq", bits=3, group_size=64, sym=False, format="gptq_v2"),
    "awq 4-bit": dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm"),
    "fp8 blocks": dict(quant_method="fp8", activation_scheme="none", weight_block_size=[32, 32]),
    "gguf Q4_0": dict(quant_method="gguf", file_type="Q4_0", embeddings=False, output=False),
    "quip E8P": ROOT / "plugins" / "qhub-quip" / "tests" / "data" / "tiny-llama",
    "aqlm 2x8": ROOT / "plugins" / "qhub-aqlm" / "tests" / "data" / "tiny-llama-2x8",
}


class _Rounded:
    """Rounds a layer's input as LLM.int8() does (Dettmers et al. 2022, section 3), before the layer takes it.

    The gradient passes straight through the rounding, as in the paper's training. A hook, not a class of layers: some
    tuners take layers of the exact type nn.Linear only.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            rows = args[0].reshape(-1, args[0].shape[-1])
            large = rows.abs() >= self._threshold if self._threshold else torch.zeros_like(rows, dtype=torch.bool)
            outliers, kept = large.any(0), rows.masked_fill(large, 0)
            step = kept.abs().amax(-1, keepdim=True) / 127
            step = torch.where(step == 0, torch.ones_like(step), step)
            error = (torch.where(outliers, rows, (kept / step).round() * step) - rows).reshape(args[0].shape)
        return (args[0] + error, *args[1:])


def _twin_layer(layer: nn.Linear, layout: Layout) -> nn.Linear:
    kind = layout.activation.kind
    assert kind in ("none", "int8"), f"write a twin for layers that round their input to {kind}"
    twin = nn.Linear(layer.in_features, layer.out_features, bias=False)
    if kind == "int8":
        twin.register_forward_pre_hook(_Rounded(layout.activation.threshold))
    twin.bias = layer.bias
    twin.weight = nn.Parameter(layer.weight.dequantize(torch.float32), requires_grad=False)
    return twin


def dense_twin(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in which every quantized weight is dense."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        for field, value in list(module.named_parameters(recurse=False)):
            if not isinstance(value, QuantizedTensor):
                continue
            if isinstance(module, nn.Linear):
                twin.set_submodule(name, _twin_layer(module, value.quant_layout))
            else:
                # Fused experts: with an adapter on them, peft multiplies with the sum, a dense weight.
                setattr(module, field, nn.Parameter(value.dequantize(torch.float32), requires_grad=False))
    # What remains of the quantizer would send the adapter's libraries into their code for quantized models.
    base = twin.get_base_model() if isinstance(twin, PeftModel) else twin
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "hqq_quantized"):
        if hasattr(base, name):
            delattr(base, name)
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    return twin


def parsed(values: Mapping[str, Any]) -> Any:
    """Return the config object for ``values``."""
    return registry.call(values["quant_method"], "qhub_config").parse(dict(values))


def _write_model(architecture: str, folder: Path) -> None:
    """Write a random float32 model of one layer: two would only take twice as long."""
    from transformers import AutoModelForCausalLM

    config = build_config(architecture, HIDDEN)
    values = {**config.to_dict(), "num_hidden_layers": 1, "layer_types": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(type(config)(**values), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                # They start as zeros, and a bias that gets lost would not be noticed.
                torch.nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim > 1:
                # Weights as large as those of real models beside their inputs: an adapter's share is measurable.
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)


class Bases:
    """Makes each model once, and hands out copies."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._dense: dict[str, Path] = {}
        self._models: dict[tuple[str, str], nn.Module] = {}

    def dense_folder(self, architecture: str) -> Path:
        """Return the folder of a random float32 model."""
        if architecture not in self._dense:
            folder = self._factory.mktemp(architecture)
            _write_model(architecture, folder)
            self._dense[architecture] = folder
        return self._dense[architecture]

    def quantized(self, name: str, architecture: str = "llama") -> nn.Module:
        """Return a copy of the model of column ``name``."""
        return copy.deepcopy(self._made(name, architecture)[0])

    def twin(self, name: str, architecture: str = "llama") -> nn.Module:
        """Return a copy of its dense twin."""
        return copy.deepcopy(self._made(name, architecture)[1])

    def _made(self, name: str, architecture: str) -> tuple[nn.Module, nn.Module]:
        key = (name, architecture)
        if key not in self._models:
            model = self._make(name, architecture)
            self._models[key] = (model, dense_twin(model))
        return self._models[key]

    def _make(self, name: str, architecture: str) -> nn.Module:
        from transformers import AutoModelForCausalLM

        values = BASES[name]
        if isinstance(values, Path):
            assert architecture == "llama", f"{name} comes from a checkpoint: there is none of {architecture}"
            return AutoModelForCausalLM.from_pretrained(values, dtype=torch.float32).eval()
        with pytest.MonkeyPatch.context() as patch:
            calibrate_with_few(patch, {})
            folder = self.dense_folder(architecture)
            return AutoModelForCausalLM.from_pretrained(folder, quantization_config=parsed(values)).eval()
