"""The matrix knows every tuner of the installed peft, every variant of LoRA, and every method of the repository."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from qhub.plan import LayerPlan
from qhub.registry import registry

from .bases import BASES, ROOT, parsed
from .matrix import CASES, COLUMNS, ROWS
from .tuners import LORA

# What LoRA offers and the matrix has no row for, with the reason.
NO_ROW = {
    "loftq": "tests/integrations has it: it is qhub's own on quantized models",
    "arrow_config": "routes between trained LoRA adapters, which have rows of their own",
    "megatron_config": "needs Megatron",
}


def test_every_tuner_of_peft_has_a_row() -> None:
    offered = {tuner.value for tuner in (*PEFT_TYPE_TO_TUNER_MAPPING, *PEFT_TYPE_TO_CONFIG_MAPPING)}
    missing = offered - {case.tuner for case in CASES}
    assert not missing, (
        f"peft {peft.__version__} has tuners that the matrix does not know: {sorted(missing)}. Add a case each to "
        "tests/adapters/tuners.py or prompts.py"
    )


def test_every_variant_of_lora_has_a_row() -> None:
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    variants = {name for name, field in fields.items() if field.metadata.get("is_lora_variant")}
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    starts = {str(one) for part in typing.get_args(hint) for one in typing.get_args(part)}
    # "pissa_niter_[number of iters]" stands for a family of names.
    starts = {one.partition("[")[0] for one in starts}
    assert variants and starts, "peft describes its variants in another way now"
    configs = [case.config(None) for case in LORA]  # type: ignore[arg-type]
    used = {name for name in variants if any(getattr(config, name) for config in configs)}
    begun = {one for one in starts if any(str(config.init_lora_weights).startswith(one) for config in configs)}
    missing = (variants - used) | (starts - begun) - set(NO_ROW)
    missing -= set(NO_ROW)
    assert not missing, (
        f"LoRA of peft {peft.__version__} offers {sorted(missing)}: add cases to tests/adapters/tuners.py"
    )


def test_every_layout_that_a_method_plans_has_a_column() -> None:
    """What a tuner meets is the layout: one method per kind of layout stands for the others."""
    used = set()
    for values in BASES.values():
        if isinstance(values, dict):
            used |= _kinds(values["quant_method"], parsed(values))
    methods = set()
    for file in ROOT.glob("plugins/*/pyproject.toml"):
        points = tomllib.loads(file.read_text(encoding="utf-8"))["project"].get("entry-points", {})
        methods |= set(points.get("qhub.plugins", {}))
    assert len(methods) > 10
    for method in sorted(methods):
        spec = registry.call(method, "qhub_config")
        if not registry.has(method, "qhub_quantize"):
            continue
        for preset, values in (spec.presets or {"defaults": {}}).items():
            kinds = _kinds(method, spec.parse({**values, "quant_method": method}))
            assert kinds, f"{method} {preset} plans nothing"
            assert kinds <= used, f"no column stands for {sorted(kinds - used)} of {method} {preset}"


def _kinds(method: str, config: Any) -> set[str]:
    """Return the kinds of layouts that ``method`` plans for a tiny Llama."""
    from transformers import AutoModelForCausalLM

    from qhub.integrations.transformers.weights import find_weights
    from qhub.testing.conformance.models import build_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config("llama", 256))
    weights = [info for name, info in find_weights(model).items() if "lm_head" not in name]
    answer = registry.call(method, "qhub_plan", config=config, weights=weights, model_config=model.config)
    return {planned.layout.kind for planned in answer.values() if isinstance(planned, LayerPlan)}


def test_rows_are_named_once() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert set(COLUMNS) <= set(BASES) and set(ROWS) <= set(names)
