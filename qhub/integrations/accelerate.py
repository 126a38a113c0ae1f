"""What accelerate must not do to a quantized model under FSDP2: broadcast its weights as floats.

With ``cpu_ram_efficient_loading`` (the default of ``accelerate config``) the first process sends every parameter to the
others, which hold none. Quantized models are loaded by every process from the same checkpoint, so nothing is missing.
"""

from __future__ import annotations

import logging
from typing import Any

from qhub.integrations.late import wrap_when_imported

__all__ = ["watch"]

logger = logging.getLogger("qhub")


def watch() -> None:
    """Arrange that ``Accelerator.prepare`` keeps quantized weights out of that broadcast, now or when it is
    imported."""
    wrap_when_imported("accelerate.accelerator", "Accelerator.prepare", _prepare)


def _prepare(original: Any, accelerator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if getattr(plugin, "cpu_ram_efficient_loading", False) and any(_is_quantized(argument) for argument in args):
        if accelerator.is_main_process:
            logger.warning(
                "cpu_ram_efficient_loading is turned off: it would send the quantized weights as floats, and every "
                "process has loaded its codes already"
            )
        plugin.cpu_ram_efficient_loading = False
    return original(*args, **kwargs)


def _is_quantized(argument: Any) -> bool:
    from torch import nn

    from qhub.tensor import QuantizedTensor

    return isinstance(argument, nn.Module) and any(isinstance(p, QuantizedTensor) for p in argument.parameters())
