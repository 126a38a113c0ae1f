"""The scale methods of Intel Neural Compressor by name: how weights' and inputs' scales are found and rounded.

Source: neural-compressor 3, ``scale_method_config_mapping`` of
torch/algorithms/fp8_quant/_core/scale_methods/scale_method_config.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DYNAMIC_ONLY", "SCALE_METHODS", "Method", "Rule"]

# Per tensor: every power of two in this range is tried; per row: these multiples of the scale of the largest weight.
_POWERS = tuple(2.0**exponent for exponent in range(-10, 10))
_AROUND = tuple(2.0**exponent for exponent in range(-3, 5))


@dataclass(frozen=True)
class Rule:
    """Says how one scale is found.

    ``value``: from the largest magnitude, the one ("opt") of ``candidates`` with the least squared error, or fixed.
    ``rounding``: up to a power of two, to a scale that the hardware multiplies by for free ("hw"), or none. ``rows``:
    one scale a row (of the weight; of the input, a token), else one for all. ``backoff``: which part of the format's
    range the largest magnitude fills. ``candidates``: empty where they are the hardware's.
    """

    value: Literal["maxabs", "opt", "unit", "hw_single"] = "maxabs"
    rounding: Literal["none", "pow2", "hw"] = "none"
    rows: bool = False
    backoff: float = 1.0
    candidates: tuple[float, ...] = ()

    @property
    def fixed(self) -> bool:
        """Return whether the scale depends on nothing that is measured."""
        return self.value in ("unit", "hw_single")


@dataclass(frozen=True)
class Method:
    """Is a scale method: the rules of weights and of inputs."""

    weight: Rule
    activation: Rule


def _weight(rounding: Literal["none", "pow2", "hw"], rows: bool = False) -> Rule:
    return Rule(rounding=rounding, rows=rows, backoff=0.5)


def _input(rounding: Literal["none", "pow2", "hw"]) -> Rule:
    return Rule(rounding=rounding, backoff=0.25)


_OPT_ROWS = Rule("opt", "pow2", rows=True, backoff=0.5, candidates=_AROUND)
# The mapping has no backoff for these inputs; dynamic quantization sets 0.5 (ScaleMethodFactory.get_scale_method).
_INPUT_ROWS = Rule(rounding="pow2", rows=True, backoff=0.5)

SCALE_METHODS: dict[str, Method] = {
    "unit_scale": Method(Rule("unit"), Rule("unit")),
    "hw_aligned_single_scale": Method(Rule("hw_single"), Rule("hw_single")),
    "maxabs_hw": Method(_weight("hw"), _input("hw")),
    "maxabs_pow2": Method(_weight("pow2"), _input("pow2")),
    "maxabs_arbitrary": Method(_weight("none"), _input("none")),
    "maxabs_hw_opt_weight": Method(Rule("opt", "hw", backoff=0.5), _input("hw")),
    "maxabs_pow2_opt_weight": Method(Rule("opt", "pow2", backoff=0.5, candidates=_POWERS), _input("pow2")),
    "act_maxabs_hw_weights_pcs_maxabs_pow2": Method(_weight("pow2", rows=True), _input("hw")),
    "act_maxabs_hw_weights_pcs_opt_pow2": Method(_OPT_ROWS, _input("hw")),
    "act_maxabs_pow2_weights_pcs_maxabs_pow2": Method(_weight("pow2", rows=True), _input("pow2")),
    "act_maxabs_pow2_weights_pcs_opt_pow2": Method(_OPT_ROWS, _input("pow2")),
    "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw": Method(_weight("hw"), _INPUT_ROWS),
    "maxabs_pcs_pow2": Method(_weight("pow2", rows=True), _INPUT_ROWS),
}

# Their inputs' scales are found anew for each token.
DYNAMIC_ONLY = frozenset({"act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw", "maxabs_pcs_pow2"})
