"""What a method, and whoever runs it, ask of the calibration engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qhub.errors import ConfigError

__all__ = ["CalibrationOptions"]


# Measured on two cores with a model of 26 M parameters: a fifth faster than batches of 4096 tokens.
_CPU_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Says which data pass through the model, and how.

    ``data``: what :func:`qhub.calibration.data.samples_of` takes; None: the model writes its own text. ``tokenizer``: a
    name, a folder or an object; None: the model's own. ``samples``: how many at most. ``length``: tokens a sample at
    most; None: 2048, or the model's context where that is shorter. ``batch_size``: samples of equal length that pass
    together; None: 8, on a CPU as many as make 1024 tokens (larger ones leave its caches). ``sequential``:
    ``"groups"``: the inputs of a layer come from a block whose earlier layers are quantized already (one pass for each
    group of layers with a common input); ``"block"``: all of a block's inputs come from one pass, before any of its
    layers is quantized. ``place``: where the blocks' outputs are kept between blocks: on the compute ``"device"``, in
    main memory (``"cpu"``) or on the ``"disk"``. ``device``: where blocks are computed; None: the accelerator if there
    is one. ``dtype``: of computing; None: float32 on a CPU (whose bfloat16 products are slower), the model's own
    elsewhere. ``min_tokens``: an expert that saw fewer gets neutral statistics, with a warning. ``seed``: of text that
    the model writes.
    """

    data: Any = None
    tokenizer: Any = None
    samples: int = 128
    length: int | None = None
    batch_size: int | None = None
    sequential: Literal["groups", "block"] = "groups"
    place: Literal["device", "cpu", "disk"] = "device"
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    min_tokens: int = 32
    seed: int = 0
    scratch: Path | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "min_tokens"):
            value = getattr(self, name)
            if name == "batch_size" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r} of the calibration: it is a whole number, at least 1")
        if self.length is not None and (type(self.length) is not int or self.length < 2):
            raise ConfigError(f"length={self.length!r} of the calibration: it is a whole number of tokens, at least 2")
        for name, allowed in (("sequential", ("groups", "block")), ("place", ("device", "cpu", "disk"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} of the calibration: it is one of {allowed}")

    def batch(self, tokens: int) -> int:
        """Return how many samples of ``tokens`` tokens pass together."""
        if self.batch_size is not None:
            return self.batch_size
        return max(1, _CPU_TOKENS // max(tokens, 1)) if self.compute_device().type == "cpu" else 8

    def compute_device(self) -> torch.device:
        """Return the device that blocks are computed on."""
        if self.device is not None:
            return torch.device(self.device)
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is not None:
            # With its number: of several processes each has its own.
            return torch.device(found.type, torch.accelerator.current_device_index())
        return torch.device("cpu")
