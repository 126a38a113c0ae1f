"""The local names of the entries that a weight has in a file: ``_{parameter}_{attribute of the tensor}``.

Source: torchao 0.18, ``flatten_tensor_state_dict`` (prototype/safetensors/safetensors_support.py).
"""

from __future__ import annotations

__all__ = ["ACT_PRE_SCALE", "ALL", "QDATA", "SCALE", "SCALE_AND_ZERO", "STACKS", "ZERO", "attribute"]

QDATA = "_weight_qdata"
SCALE = "_weight_scale"
ZERO = "_weight_zero_point"
SCALE_AND_ZERO = "_weight_scale_and_zero"
ACT_PRE_SCALE = "_weight_act_pre_scale"

# With what is known and not offered: static scales of inputs, and the scales of torchao's 4-bit floats.
ALL = frozenset(
    {
        QDATA, SCALE, ZERO, SCALE_AND_ZERO, ACT_PRE_SCALE, "_weight_act_quant_scale", "_weight_act_quant_zero_point",
        "_weight_per_tensor_scale", "_weight_act_per_tensor_scale",
    }
)  # fmt: skip


# The endings of a fused parameter's entries: ``experts._down_proj_qdata``.
STACKS = {"_qdata": QDATA, "_scale": SCALE, "_zero_point": ZERO}


def attribute(name: str) -> str:
    """Return the attribute of torchao's tensor that an entry holds."""
    return name.removeprefix("_weight_")
