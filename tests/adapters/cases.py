"""What one row of the matrix is: a tuner of peft with a configuration that fits the tiny models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from qhub.testing.conformance.models import INPUT

__all__ = ["TARGETS", "Case", "leave_alone", "noise", "tuner_of"]

# A square matrix, one that is shared by heads, a tall one and a wide one.
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def tuner_of(config: Any) -> str:
    """Return peft's name of the tuner that the configuration class ``config`` belongs to."""
    (name,) = [tuner.value for tuner, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls is config]
    return name


def leave_alone(*args: Any) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Case:
    """Describes one row.

    ``tuner``: the value of peft's ``PeftType``. ``config``: makes the configuration for a base model.
    ``prepare``: called with the base model and the configuration before peft wraps it; ``finish``: with the wrapped
    model. ``inputs``: arguments of every forward, beside the labels. ``moves_base``: the tuner takes its start out of
    the base weights, so they are others afterwards. ``rate``: learning rate. ``drifts``: its own forward
    changes the adapter, by rounding. ``needs``: a package that peft asks for. ``architecture``: the tiny model; of
    :data:`qhub.testing.conformance.models.ARCHITECTURES`.
    """

    name: str
    tuner: str
    config: Callable[[nn.Module], Any]
    prepare: Callable[[nn.Module, Any], None] = leave_alone
    finish: Callable[[nn.Module], None] = leave_alone
    inputs: Mapping[str, Any] = field(default_factory=lambda: {"input_ids": INPUT})
    moves_base: bool = False
    rate: float = 1e-2
    needs: str | None = None
    drifts: bool = False
    architecture: str = "llama"

    def __str__(self) -> str:
        return self.name


def noise(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a change of ``parameter`` that is small beside it, or small on its own where it is zero."""
    size = float(parameter.detach().float().square().mean().sqrt())
    return torch.randn(parameter.shape, generator=generator) * max(0.2 * size, 0.03)
