"""Rows that need another model or other targets: fused experts, layers with biases, embeddings and output heads."""

from __future__ import annotations

from typing import Any

import peft

from .cases import Case, tuner_of

__all__ = ["OTHER_CASES"]

_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_OPT = ["q_proj", "out_proj", "fc1", "fc2"]


def _case(name: str, cls: Any, architecture: str, **values: Any) -> Case:
    return Case(name, tuner_of(cls), lambda model: cls(**values), architecture=architecture)


def _lora(name: str, architecture: str, **values: Any) -> Case:
    return _case(name, peft.LoraConfig, architecture, **{"r": 4, "lora_alpha": 8, **values})


OTHER_CASES = [
    _lora("Fused experts: LoRA", "qwen3_moe", target_modules=[], target_parameters=_EXPERTS),
    _lora("Fused experts and attention: LoRA", "qwen3_moe", target_modules=["q_proj", "o_proj"],
          target_parameters=_EXPERTS),
    _lora("OPT: LoRA", "opt", target_modules=_OPT),
    _lora("OPT: LoRA, DoRA", "opt", target_modules=_OPT, use_dora=True),
    _lora("OPT: LoRA, biases of its own", "opt", target_modules=_OPT, lora_bias=True),
    _lora("OPT: LoRA, biases trained", "opt", target_modules=_OPT, bias="all"),
    _case("OPT: BEFT", peft.BeftConfig, "opt", target_modules=["v_proj"]),
    _case("OPT: BOFT", peft.BOFTConfig, "opt", target_modules=_OPT, boft_block_size=4),
    _case("OPT: HRA", peft.HRAConfig, "opt", target_modules=_OPT, r=4),
    _case("OPT: IA3", peft.IA3Config, "opt", target_modules=["v_proj", "fc2"], feedforward_modules=["fc2"]),
    _case("OPT: LoKr", peft.LoKrConfig, "opt", target_modules=_OPT, r=4),
    _case("OPT: RoAd", peft.RoadConfig, "opt", target_modules=_OPT, group_size=16),
    _lora("Embeddings: LoRA", "llama", target_modules=["embed_tokens", "q_proj"]),
    _lora("Embeddings trained whole: LoRA", "llama", target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    _lora("Head trained whole: LoRA", "llama", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    _lora("Some tokens trained: LoRA", "llama", target_modules=["q_proj"], trainable_token_indices=[2, 3, 5]),
]  # fmt: skip
