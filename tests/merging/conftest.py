"""Adapters that learned something, on a small real model that is quantized: what merging has to keep."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qhub.testing import threads

# A little English that the model has seen none of.
_TEXT = "The lighthouse keeper counted seven gulls before breakfast, and wrote their names into a green book. " * 6


def _configs() -> dict[str, Any]:
    from transformers import BitsAndBytesConfig, HqqConfig

    return {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "hqq4": HqqConfig(nbits=4, group_size=64),
        "hqq3": HqqConfig(nbits=3, group_size=64),
    }


class Case:
    """Is a quantized model with a trained LoRA adapter; ``fresh`` gives copies."""

    def __init__(self, name: str, source: Path, folder: Path) -> None:
        import peft
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokens = AutoTokenizer.from_pretrained(source)(_TEXT, return_tensors="pt").input_ids[:, :128]
        base = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=_configs()[name], dtype=torch.float32, attn_implementation="eager"
        )
        self.base, self.adapter = folder / "base", folder / "adapter"
        base.save_pretrained(self.base)
        torch.manual_seed(0)
        model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(6):
            model(input_ids=self.tokens, labels=self.tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(self.adapter)
        self._model = model.eval()

    def fresh(self) -> Any:
        """Return a copy of the PeftModel."""
        return copy.deepcopy(self._model)

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        """Return the logits of the tokens that the adapter was trained on."""
        return model(input_ids=self.tokens).logits[0]


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Compute on one thread: on matrices this small a second one only waits."""
    with threads.one_thread():
        yield


@pytest.fixture(scope="session")
def cases(doclm: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the case of a name, made once."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = Case(name, doclm, tmp_path_factory.mktemp(name))
        return made[name]

    return case
