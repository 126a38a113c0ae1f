"""Another method's layouts as schemes of this one: how its numbers reach vLLM and SGLang.

Every group of weights that share a scale becomes a group along K, finer where it must be; numbers stay what they are.
Weights without rounded inputs go to the packed formats, others to those of a byte per code, as upstream chooses
(compressed_tensors/compressors/format.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts import Activation, Affine, Float8, Grid, Layout, Lookup
from qhub.plan import Adoption, Skip
from qhub_compressed_tensors.layout import ORDER, layout_of
from qhub_compressed_tensors.presets import numbers
from qhub_compressed_tensors.scheme import Scheme, inferred_format, numbers_of, scheme_of
from qhub_compressed_tensors.targets import expressions

__all__ = ["adopt"]

# Below it, scales would take more room than the codes.
_SMALLEST_GROUP = 4


def adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    """Return config and layouts for the weights ``layouts``, by name; ``others``: linear weights that stay dense.

    ``options``: ``ignore``, further patterns that stand in the config. The scheme of most weights targets the class
    Linear, others their modules by name. Raises :class:`ConfigError` on other options.
    """
    unknown = sorted(set(options) - {"ignore"})
    if unknown:
        raise ConfigError(
            f"the options {unknown} cannot be asked of compressed-tensors here: its config follows from the numbers "
            "that are taken over"
        )
    values: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = {}
    found: dict[str, Layout | Skip] = {}
    for name, layout in layouts.items():
        group = _group_of(layout)
        if isinstance(group, Skip):
            found[name] = group
            continue
        key = json.dumps(group, sort_keys=True)
        values[key] = group
        members.setdefault(key, []).append(name.removesuffix(".weight"))
        scheme = scheme_of("adopted", {"targets": ["Linear"], **group}, "mixed-precision")
        assert isinstance(scheme, Scheme)
        found[name] = layout_of(scheme, layout.out_features, layout.in_features, name)
    left = [name for name, layout in found.items() if isinstance(layout, Skip)]
    ignore = [name.removesuffix(".weight") for name in (*others, *left)]
    return Adoption(_config(values, members, [*ignore, *(options.get("ignore") or [])]), found)


def _config(values: Mapping[str, dict[str, Any]], members: Mapping[str, list[str]], ignore: list[str]) -> Any:
    from qhub_compressed_tensors.ct_config import CompressedTensorsConfig

    ordered = sorted(members, key=lambda key: -len(members[key]))
    groups: dict[str, Any] = {
        f"group_{index}": {
            "targets": ["Linear"] if index == 0 else expressions(members[key]), **values[key],
        }
        for index, key in enumerate(ordered)
    }  # fmt: skip
    formats = {group["format"] for group in groups.values()}
    return CompressedTensorsConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        quantization_status="compressed",
        ignore=list(dict.fromkeys(ignore)),
    )


def _group_of(layout: Layout) -> dict[str, Any] | Skip:
    """Return weights, inputs and format of the scheme for ``layout``, or why there is none."""
    ordered = layout.transforms == ORDER
    if layout.transforms and not ordered:
        kinds = [f"{one.side} {one.kind}" for one in layout.transforms]
        return Skip(f"compressed-tensors stores no transforms but an order of input features; this weight has {kinds}")
    inputs = _inputs(layout.activation)
    if isinstance(layout, Affine):
        weights = _integers(layout, ordered)
    elif ordered:
        return Skip("compressed-tensors stores an order of input features for integers only")
    elif isinstance(layout, Float8):
        weights = _float8(layout)
    elif isinstance(layout, Lookup):
        weights = _float4(layout)
    else:
        return Skip(f"compressed-tensors has no {layout.kind} codes")
    if isinstance(weights, Skip):
        return weights
    if ordered or (isinstance(layout, Affine) and layout.bits < 8 and inputs and inputs["type"] == "float"):
        # Packed: codes below a byte with float8 inputs too, which is what vLLM's kernels for them take.
        fmt = "pack-quantized"
    else:
        held = None if inputs is None else numbers_of(inputs, "inputs")
        fmt = inferred_format(numbers_of(weights, "weights"), held)
    return {"weights": weights, "input_activations": inputs, "format": fmt}


def _run(grid: Grid, in_features: int) -> int | Skip:
    """Return how many neighbours in a row share a scale on a grid along K at least as fine as ``grid``."""
    if grid.kind == "strided":
        return Skip("the members of a group lie in all rows (axis 0), and compressed-tensors has groups along a row")
    run = in_features if grid.cols >= in_features and grid.kind == "block" else math.gcd(grid.cols, in_features)
    if run < min(_SMALLEST_GROUP, in_features):
        return Skip(f"groups of {grid.cols} do not divide rows of {in_features}; those of compressed-tensors have to")
    return run


def _integers(layout: Affine, ordered: bool) -> dict[str, Any] | Skip:
    run = _run(layout.grid, layout.in_features)
    if isinstance(run, Skip):
        return run
    if ordered and run != layout.grid.cols:
        return Skip("features in an order of their own need groups of the size that they were put into")
    middle = 0.0 if layout.signed else 2.0 ** (layout.bits - 1)
    symmetric = layout.zero == "constant" and layout.zero_point == middle
    whole = run == layout.in_features
    weights = {**numbers(layout.bits, "int", "channel" if whole else "group"), "symmetric": symmetric}
    weights |= {} if whole else {"group_size": run}
    return {**weights, "actorder": "group"} if ordered else weights


def _float8(layout: Float8) -> dict[str, Any] | Skip:
    if layout.format != "e4m3fn":
        return Skip(f"compressed-tensors stores 8-bit floats as E4M3 (e4m3fn), these are {layout.format}")
    n, k, grid = layout.out_features, layout.in_features, layout.grid
    if grid.kind != "block":
        return Skip("compressed-tensors has groups within a row, blocks, rows and the whole for 8-bit floats")
    if grid.rows >= n > 1 and grid.cols >= k:
        return numbers(8, "float", "tensor")
    if grid.rows == 1 and grid.cols >= k:
        return numbers(8, "float", "channel")
    if grid.rows > 1:
        return numbers(8, "float", "block", block_structure=[grid.rows, grid.cols])
    run = _run(grid, k)
    if isinstance(run, Skip):
        return run
    powers: dict[str, Any] = {"scale_dtype": "torch.uint8"} if run == 32 else {}
    return numbers(8, "float", "group", group_size=run, **powers)


def _float4(layout: Lookup) -> dict[str, Any] | Skip:
    nested, grid = layout.scales_nested, layout.grid
    if layout.bits == 4 and grid.kind == "block" and grid.rows == 1 and layout.in_features % grid.cols == 0:
        if nested is None and grid.cols == 32:
            return numbers(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
        if nested is not None and (nested.dtype, nested.group, grid.cols) == ("float8_e4m3fn", 0, 16):
            return numbers(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
    return Skip(
        f"compressed-tensors has 4-bit floats in groups of 16 (NVFP4) and 32 (MXFP4), no table of {2**layout.bits} "
        f"values in groups of {grid.cols}"
    )


def _inputs(activation: Activation) -> dict[str, Any] | None:
    """Return how inputs are rounded; None where upstream cannot say it, so that they are left alone.

    LLM.int8() keeps outliers aside (``threshold``); rounding them away would cost more than it gains.
    """
    if activation.kind == "none" or activation.threshold:
        return None
    strategy = {"row": "token", "tensor": "tensor"}.get(activation.granularity, "group")
    kind = "int" if activation.kind == "int8" else "float"
    size: dict[str, Any] = {"group_size": activation.group} if activation.group else {}
    if activation.kind == "float4":
        if (activation.group, activation.scale_format) == (16, "e4m3fn"):
            scales = "torch.float8_e4m3fn"
            return numbers(4, "float", "tensor_group", dynamic="local", group_size=16, scale_dtype=scales)
        if activation.group == 32 and activation.scale_format in ("e8m0fnu", "e8m0even"):
            return numbers(4, "float", "group", dynamic=True, group_size=32, scale_dtype="torch.uint8")
        return None
    if kind == "float" and (activation.format != "e4m3fn" or activation.limit is not None):
        return None
    if activation.scale_format != "float32" and activation.group == 32:
        size["scale_dtype"] = "torch.uint8"
    values = numbers(activation.bits if kind == "int" else 8, kind, strategy, dynamic=not activation.static, **size)
    return {**values, "symmetric": activation.symmetric}
