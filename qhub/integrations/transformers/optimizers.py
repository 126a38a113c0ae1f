"""Which optimizer a training script gets when the one it names cannot run here: a word about it, then the plain one.

QLoRA's recipe names ``paged_adamw_8bit`` or ``paged_adamw_32bit``. These are bitsandbytes' and page between GPU and CPU
memory (Dettmers et al. 2023, section 3); without a GPU there is nothing to page, and transformers stops with an import
error. A script written for a GPU should train on a CPU too, so ``Trainer`` of a model that qhub quantized falls back.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

from qhub.integrations.late import wrap_when_imported

__all__ = ["optimizer_name", "watch"]

# bitsandbytes' optimizers in transformers.training_args.OptimizerNames that have a plain twin there. Lion and AdEMAMix
# have none: transformers' own error stands.
_PLAIN = {
    "adamw_bnb_8bit": "adamw_torch",
    "adamw_8bit": "adamw_torch",
    "paged_adamw": "adamw_torch",
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_torch",
    "rmsprop_bnb": "rmsprop",
    "rmsprop_bnb_8bit": "rmsprop",
    "rmsprop_bnb_32bit": "rmsprop",
}


def optimizer_name(name: str, device: str | None = None) -> str:
    """Return ``name`` if that optimizer of transformers can run here, else its plain twin, with a warning.

    ``name``: as in ``TrainingArguments(optim=...)``. ``device``: the type of device that will train; None for the
    accelerator, if there is one.
    """
    plain = _PLAIN.get(name)
    if plain is None:
        return name
    import torch

    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found.type if found is not None else "cpu"
    if device == "cpu":
        reason = "the model trains on a CPU, and bitsandbytes' optimizers need a GPU"
    elif importlib.util.find_spec("bitsandbytes") is None:
        reason = "bitsandbytes is not installed (pip install bitsandbytes)"
    else:
        return name
    warnings.warn(f"optim={name!r} cannot run here: {reason}. Training with {plain!r} instead", stacklevel=2)
    return plain


def watch() -> None:
    """Arrange that ``Trainer`` asks :func:`optimizer_name` for models that qhub quantized, now or when it is
    imported."""
    wrap_when_imported("transformers.trainer", "Trainer.create_optimizer", _create_optimizer)


def _create_optimizer(original: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from qhub.tensor import QuantizedTensor

    if trainer.optimizer is None and any(isinstance(p, QuantizedTensor) for p in trainer.model.parameters()):
        named = trainer.args.optim
        trainer.args.optim = type(named)(optimizer_name(str(getattr(named, "value", named)), trainer.args.device.type))
    return original(*args, **kwargs)
