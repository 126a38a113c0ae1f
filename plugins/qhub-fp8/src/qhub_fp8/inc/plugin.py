"""The qhub plugin of the method ``inc``: Intel Neural Compressor's FP8 models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qhub import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from qhub.calibration import CalibrationOptions
    from qhub.config import ConfigSpec
    from qhub.formats import Format
    from qhub.layouts import Layout
    from qhub.merging import AdapterPolicy
    from qhub.plan import LayerPlan, Skip, WeightInfo


@hookimpl
def qhub_config() -> ConfigSpec:
    """Describe FP8Config."""
    from qhub.config import ConfigSpec
    from qhub_fp8.inc.config import _ALIASES, _NOISE, FP8Config
    from qhub_fp8.inc.plan import record

    return ConfigSpec(
        cls=FP8Config,
        keys=_NOISE | frozenset(_ALIASES),
        skip="modules_to_not_convert",
        head="quantizes_head",
        record=record,
        presets={
            "maxabs-hw": {"scale_method": "maxabs_hw"},
            "maxabs-pow2": {"scale_method": "maxabs_pow2"},
            "per-channel": {"scale_method": "act_maxabs_pow2_weights_pcs_opt_pow2"},
        },
    )


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight that the lists allow, fused experts included."""
    from qhub_fp8.inc.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_calibration(config: Any) -> CalibrationOptions | None:
    """Take data and tokenizer from the config, where inputs are measured."""
    from qhub_fp8.config import calibration

    return calibration(config) if config.measures else None


@hookimpl
def qhub_quantize(
    config: Any, weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Find scales as the config's scale method does."""
    from qhub_fp8.inc.plan import quantize

    return quantize(config, weight, layout, statistics)


@hookimpl
def qhub_format(config: Any) -> Format:
    """Return the entries of that library's own files."""
    from qhub_fp8.inc.format import IncFormat

    return IncFormat(config.dtype, config.use_qdq)


@hookimpl
def qhub_adapter(config: Any) -> AdapterPolicy:
    """Keep scales that the hardware likes."""
    from qhub_fp8.inc.plan import merge_policy

    return merge_policy(config)
