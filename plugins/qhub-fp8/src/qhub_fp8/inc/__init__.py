"""Intel Neural Compressor's FP8 workflow, in its own words, without the library and on any machine::

    from qhub_fp8.inc import FP8Config, convert, finalize_calibration, prepare

    model = prepare(model, FP8Config(scale_method="maxabs_hw", blocklist={"names": ["lm_head"]}))
    run_some_text_through(model)
    finalize_calibration(model)      # writes the measurements as JSON
    model = convert(model)           # quantized; save_pretrained, from_pretrained, LoRA work

The same with one call: ``from_pretrained(..., quantization_config=FP8Config(...))``, which calibrates block by block.

Files::

    config.py    FP8Config, the library's vocabulary
    methods.py   the scale methods by name
    scales.py    their arithmetic
    plan.py      which layer is quantized, its layout and its numbers
    format.py    the checkpoint entries
    measuring.py observers, and measurements as JSON
    workflow.py  prepare, finalize_calibration, convert, save, load
    plugin.py    the qhub plugin of the method ``inc``
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qhub_fp8.inc.config import FP8Config
    from qhub_fp8.inc.workflow import convert, finalize_calibration, load, prepare, save

__all__ = ["FP8Config", "convert", "finalize_calibration", "load", "prepare", "save"]

_HOMES = {"FP8Config": "config", **dict.fromkeys(set(__all__) - {"FP8Config"}, "workflow")}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"qhub_fp8.inc.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qhub_fp8.inc' has no attribute {name!r}")
