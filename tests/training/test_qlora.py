"""The QLoRA example in short, and the optimizers that its scripts name."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from qhub.integrations.transformers.optimizers import optimizer_name
from qhub.registry import registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    if "bitsandbytes" not in registry.list():
        pytest.skip("the plugin bitsandbytes is not installed")
    spec = importlib.util.spec_from_file_location("qlora", ROOT / "examples" / "qlora.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(out: Path, *more: str) -> list[str]:
    small = ["--steps", "8", "--batch", "4", "--length", "64", "--rank", "16", "--lr", "3e-3", "--dropout", "0"]
    return [*small, "--out", str(out), *more]


@pytest.mark.filterwarnings("ignore:optim=")
def test_short_run_beats_the_base_and_follows_16_bits(example: ModuleType, tmp_path: Path) -> None:
    result = example.main(arguments(tmp_path))
    dense, quantized = result["curves"].values()
    # The base is the 16-bit model before its first step.
    assert quantized[-1][1] < 0.9 * dense[0][1]
    assert dense[0][1] < quantized[0][1]
    # So few steps make up for a part of what quantizing cost; the full run of benchmarks/results/qlora.json for more.
    assert result["ratio"] - 1 < quantized[0][1] / dense[0][1] - 1
    assert json.loads((tmp_path / "qlora.json").read_text())["ratio"] == result["ratio"]
    assert (tmp_path / "qlora.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:optim=")
def test_short_run_with_trl(example: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    result = example.main(arguments(tmp_path, "--sft"))
    dense, quantized = result["curves"].values()
    assert quantized[-1][1] < 0.9 * dense[0][1]


def test_committed_figures_hold_what_the_page_says() -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "qlora.json").read_text())["runs"]
    for run in runs:
        dense, quantized = run["curves"].values()
        assert quantized[-1][1] < dense[0][1] < quantized[0][1]
    assert all(run["ratio"] < 1.02 for run in runs if run["model"] == "doclm-26m")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("paged_adamw_8bit", "adamw_torch"),
        ("paged_adamw_32bit", "adamw_torch"),
        ("adamw_bnb_8bit", "adamw_torch"),
        ("rmsprop_bnb_8bit", "rmsprop"),
    ],
)
def test_paged_optimizers_have_a_plain_twin(name: str, expected: str) -> None:
    assert OptimizerNames(name) and OptimizerNames(expected)
    with pytest.warns(UserWarning, match=f"{name}.*cannot run here.*{expected}"):
        assert optimizer_name(name, "cpu") == expected


def test_names_that_run_anywhere_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer_name("adamw_torch", "cpu") == "adamw_torch"
        assert optimizer_name("paged_lion_8bit", "cpu") == "paged_lion_8bit"
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        assert optimizer_name("paged_adamw_8bit", "cuda") == "paged_adamw_8bit"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="pip install bitsandbytes"):
        assert optimizer_name("paged_adamw_8bit", "cuda") == "adamw_torch"


def test_trainer_falls_back_for_quantized_models_only(pow2: str, tiny: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def trainer(**kwargs: Any) -> Trainer:
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"), **kwargs)
        lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        options = TrainingArguments(str(tmp_path), optim="paged_adamw_8bit", use_cpu=True, report_to=[])
        return Trainer(peft.get_peft_model(model, lora), options)

    quantized = trainer(quantization_config={"quant_method": pow2})
    with pytest.warns(UserWarning, match="bitsandbytes' optimizers need a GPU"):
        made = quantized.create_optimizer()
    assert type(getattr(made, "optimizer", made)) is torch.optim.AdamW
    dense = trainer()
    assert dense.args.optim == "paged_adamw_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises((ImportError, ValueError)):
            dense.create_optimizer()
