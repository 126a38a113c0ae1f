"""From a scheme to a layout: which of the core's numbers each format's weights and inputs are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qhub.errors import ConfigError, LayoutError
from qhub.layouts import Activation, Affine, Float8, Grid, Layout, Lookup, Parts, PartSpec, Transform
from qhub.layouts.float4 import mxfp4, nvfp4
from qhub_compressed_tensors.scheme import Numbers, Scheme

__all__ = ["ORDER", "PlainAffine", "WholeAffine", "activation_of", "check_zeros", "has_one_scale", "layout_of"]

ORDER = (Transform("permute", "in"),)


@dataclass(frozen=True, kw_only=True)
class WholeAffine(Affine):
    """Is an affine layout whose zeros, where it has them, are codes: files have no room for others."""

    def core_specs(self) -> dict[str, PartSpec]:
        specs = super().core_specs()
        if "zeros" in specs:
            specs["zeros"] = PartSpec(self.scale_shape, (torch.int8 if self.signed else torch.uint8,))
        return specs

    def check_values(self, parts: Parts) -> None:
        super().check_values(parts)
        if "zeros" in parts and parts["zeros"].device.type != "meta":
            check_zeros(self, parts["zeros"])


def check_zeros(layout: Affine, zeros: Tensor) -> None:
    """Raise :class:`LayoutError` where ``zeros`` are no codes."""
    low, high = layout.code_range
    if bool(((zeros < low) | (zeros > high)).any()):
        raise LayoutError(
            f"tensor 'zeros' holds {int(zeros.min())} to {int(zeros.max())}, codes of {layout.bits} bits {low}-{high}"
        )


@dataclass(frozen=True, kw_only=True)
class PlainAffine(WholeAffine):
    """Is an affine layout whose codes lie in files as one byte each, whatever their width."""


def layout_of(scheme: Scheme, out_features: int, in_features: int, name: str) -> Layout:
    """Return the layout of the weight ``name`` (out_features, in_features) under ``scheme``.

    Raises :class:`ConfigError` where groups do not divide the rows.
    """
    weights, n, k = scheme.weights, out_features, in_features
    activation = activation_of(scheme.inputs)
    if weights.group and k % weights.group:
        raise ConfigError(
            f"config_groups[{scheme.name!r}] of a compressed-tensors config: {name} has {k} inputs, which groups of "
            f"{weights.group} do not divide: list it under ignore, or choose another group_size"
        )
    if weights.type == "float" and weights.bits == 4:
        if weights.strategy == "tensor_group":
            return nvfp4(n, k, divide=True, group=weights.group, activation=activation)
        return mxfp4(n, k, group=weights.group, activation=activation)
    grid = _grid(weights, n, k)
    if weights.type == "float" and weights.bits == 6:
        return Lookup(out_features=n, in_features=k, bits=6, grid=grid, activation=activation)
    if weights.type == "float":
        return Float8(out_features=n, in_features=k, format="e4m3fn", grid=grid, activation=activation)
    return _integers(scheme, n, k, grid, activation)


def _integers(scheme: Scheme, n: int, k: int, grid: Grid, activation: Activation) -> Affine:
    weights, packed = scheme.weights, scheme.format == "pack-quantized"
    signed = not packed and weights.bits == 8
    kind = PlainAffine if not packed and not signed else Affine if weights.symmetric else WholeAffine
    return kind(
        out_features=n,
        in_features=k,
        bits=weights.bits,
        grid=grid,
        zero="constant" if weights.symmetric else "value",
        # Files of integers hold codes around zero; packed ones add half the range, and so do codes in memory.
        zero_point=0.0 if signed or not weights.symmetric else float(2 ** (weights.bits - 1)),
        signed=signed,
        transforms=ORDER if weights.ordered and weights.group < k else (),
        activation=activation,
    )


def _grid(weights: Numbers, n: int, k: int) -> Grid:
    if weights.strategy == "block":
        assert weights.block is not None
        rows, columns = weights.block
        return Grid("block", rows, columns + 1 if columns == k else columns)
    if weights.strategy == "tensor":
        return Grid("block", max(n, 2), k)
    return Grid.along_k(weights.group or k)


def has_one_scale(layout: Affine | Float8) -> bool:
    """Return whether ``layout`` is of the strategy "tensor": one scale, which files hold as a vector.

    A block that is as wide as the matrix counts as one column wider, and a tensor has at least two rows: so blocks,
    rows and the whole differ, whatever the size.
    """
    grid = layout.grid
    return grid.kind == "block" and grid.cols == layout.in_features and 1 < grid.rows >= layout.out_features


def activation_of(inputs: Numbers | None) -> Activation:
    """Return how inputs are rounded; ``inputs``: None where they are left alone.

    Upstream's dynamic integers put the largest magnitude on half the range, 127.5 for 8 bits (``calculate_qparams``,
    compressed_tensors/quantization/utils/helpers.py).
    """
    if inputs is None:
        return Activation()
    granularity = {"token": "row", "tensor": "tensor"}.get(inputs.strategy, "group")
    static = inputs.dynamic is False
    if inputs.type == "int":
        top = (2**inputs.bits - 1) / 2 if inputs.symmetric and not static else None
        return Activation(
            kind="int8", granularity=granularity, group=inputs.group, static=static, symmetric=inputs.symmetric,  # type: ignore[arg-type]
            bits=inputs.bits, top=top,
        )  # fmt: skip
    scales = "e4m3fn" if inputs.dynamic == "local" else "e8m0even" if inputs.powers else "float32"
    return Activation(
        kind="float4" if inputs.bits == 4 else "float8", granularity=granularity, group=inputs.group, static=static,  # type: ignore[arg-type]
        scale_format=scales,  # type: ignore[arg-type]
    )  # fmt: skip
