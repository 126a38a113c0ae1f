"""The tuners of peft that put something before or beside the prompt, each with a configuration for the tiny models."""

from __future__ import annotations

from typing import Any

import peft
import torch

from qhub.testing.conformance.models import INPUT

from .cases import Case, tuner_of

__all__ = ["PROMPT_TUNERS"]


def _case(name: str, cls: Any, *, inputs: dict[str, Any] | None = None, drifts: bool = False, **values: Any) -> Case:
    given = {"task_type": "CAUSAL_LM", **values}
    return Case(
        name,
        tuner_of(cls),
        lambda model: cls(**given),
        inputs={"input_ids": INPUT, **(inputs or {})},
        drifts=drifts,
    )


PROMPT_TUNERS = [
    _case("Adaption prompt", peft.AdaptionPromptConfig, adapter_len=4, adapter_layers=1),
    _case("Cartridge", peft.CartridgeConfig, num_virtual_tokens=4),
    _case("CPT", peft.CPTConfig, cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[2, 3, 4],
          inputs={"input_type_mask": torch.full_like(INPUT, 4)}, drifts=True),
    _case("Multitask prompt tuning", peft.MultitaskPromptTuningConfig, num_virtual_tokens=4, num_tasks=2,
          inputs={"task_ids": torch.tensor([1])}),
    _case("P-tuning", peft.PromptEncoderConfig, num_virtual_tokens=4, encoder_hidden_size=16),
    _case("Prefix tuning", peft.PrefixTuningConfig, num_virtual_tokens=4),
    _case("Prefix tuning, projected", peft.PrefixTuningConfig, num_virtual_tokens=4, prefix_projection=True,
          encoder_hidden_size=16),
    _case("Prompt tuning", peft.PromptTuningConfig, num_virtual_tokens=4),
]  # fmt: skip
