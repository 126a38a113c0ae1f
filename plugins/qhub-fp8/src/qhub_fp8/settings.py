"""What a FineGrainedFP8Config says of every layer, and the layout that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qhub.errors import ConfigError
from qhub.layouts import Activation, Float8, Grid, Layout, Stacked
from qhub.layouts.float4 import MXFP4_GROUP, mxfp4

__all__ = ["FORMATS", "SCHEMES", "Codes", "Settings", "float8_layout", "halves", "settings_of"]

Codes = Literal["e4m3fn", "e5m2"]
Scheme = Literal["dynamic", "static", "none"]

FORMATS: dict[str, Codes] = {"e4m3": "e4m3fn", "e4m3fn": "e4m3fn", "e5m2": "e5m2"}
SCHEMES = ("dynamic", "static", "none")


@dataclass(frozen=True)
class Settings:
    """Is what a config says, with its defaults filled in.

    ``block``: weights (rows, columns) that share a scale; None: the whole tensor. ``format``: of the weights' codes;
    inputs are E4M3. ``powers_of_two``: scales are stored as E8M0 (``scale_fmt="ue8m0"``). ``fp4_experts``: those of a
    mixture are 4-bit floats under a power of two for 32 (``expert_dtype="fp4"``, DeepSeek-V4).
    """

    block: tuple[int, int] | None = (128, 128)
    scheme: Scheme = "dynamic"
    format: Codes = "e4m3fn"
    powers_of_two: bool = False
    fp4_experts: bool = False

    def activation(self, in_features: int) -> Activation:
        """Return how inputs of ``in_features`` are rounded: in groups as wide as the weights' blocks where those are
        narrower than a row (DeepSeek-V3, 2024, section 3.3.2), else by rows."""
        if self.scheme == "none":
            return Activation()
        if self.scheme == "static":
            return Activation(kind="float8", granularity="tensor", static=True)
        group = self.block[1] if self.block is not None else in_features
        if group >= in_features:
            return Activation(kind="float8")
        return Activation(kind="float8", granularity="group", group=group)

    def layout(self, out_features: int, in_features: int, *, expert: bool = False, projections: int = 1) -> Layout:
        """Return the layout of an (out_features, in_features) matrix; ``projections``: how many equal ones are stacked
        in it, each stored with scales of its own."""
        activation = self.activation(in_features)
        if expert and self.fp4_experts:
            if in_features % MXFP4_GROUP:
                raise ConfigError(f"experts in 4 bits need input features in groups of 32, these have {in_features}")
            return mxfp4(out_features, in_features, activation=activation)
        return float8_layout(out_features, in_features, self.block, self.format, activation, projections)


def float8_layout(
    out_features: int,
    in_features: int,
    block: tuple[int, int] | None,
    codes: Codes,
    activation: Activation,
    projections: int = 1,
) -> Layout:
    """Return a float8 layout with a scale per ``block``; None: one for each of the stacked ``projections``."""
    own_rows = out_features // projections
    rows, cols = (own_rows, in_features) if block is None else (min(block[0], own_rows), min(block[1], in_features))
    grid = Grid("block", rows, cols)

    def one(height: int) -> Float8:
        return Float8(out_features=height, in_features=in_features, format=codes, grid=grid, activation=activation)

    if own_rows % rows == 0:
        return one(out_features)
    # A block may not reach from one projection into the next: a file holds each by itself.
    bands = (one(own_rows),) * projections
    return (
        bands[0]
        if projections == 1
        else Stacked(out_features=out_features, in_features=in_features, activation=activation, bands=bands)
    )


def halves(name: str, out_features: int) -> int:
    """Return how many projections the fused experts ``name`` stack on top of each other: gate and up, or one."""
    return 2 if name.rpartition(".")[2] == "gate_up_proj" and out_features % 2 == 0 else 1


def settings_of(config: Any) -> Settings:
    """Return what a FineGrainedFP8Config says; raises :class:`ConfigError` on a value that there is no layout for."""
    block = config.weight_block_size
    if block is not None:
        whole = isinstance(block, (list, tuple)) and len(block) == 2 and all(type(size) is int for size in block)
        if not whole or min(block) < 1:
            raise ConfigError(
                f"weight_block_size={block!r} of an fp8 config: it is two sizes above 0, or None for one scale per "
                "tensor"
            )
        block = (block[0], block[1])
    scheme = config.activation_scheme
    if scheme not in SCHEMES:
        raise ConfigError(f"activation_scheme={scheme!r} of an fp8 config: it is one of {', '.join(SCHEMES)}")
    codes = getattr(config, "fmt", None) or "e4m3"
    if codes not in FORMATS:
        raise ConfigError(
            f"fmt={codes!r} of an fp8 config: it is e4m3 or e5m2 (e4m3fnuz files hold other numbers under the same "
            "bytes, and no file says so in a way that could be trusted)"
        )
    scale_fmt = getattr(config, "scale_fmt", None) or "float"
    if scale_fmt not in ("float", "ue8m0"):
        raise ConfigError(f"scale_fmt={scale_fmt!r} of an fp8 config: it is float or ue8m0")
    expert_dtype = getattr(config, "expert_dtype", None) or "fp8"
    if expert_dtype not in ("fp8", "fp4"):
        raise ConfigError(f"expert_dtype={expert_dtype!r} of an fp8 config: it is fp8 or fp4")
    return Settings(block, scheme, FORMATS[codes], scale_fmt == "ue8m0", expert_dtype == "fp4")
