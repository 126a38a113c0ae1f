"""The plugin's 4-bit layout: core's Lookup, remembering the dtype that bitsandbytes writes down."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qhub.errors import LayoutError
from qhub.layouts import Grid, Lookup, Nested

__all__ = ["BLOCK_SIZE", "NESTED_BLOCK_SIZE", "STATE_DTYPES", "BlockwiseLookup", "blockwise", "nested_scales"]

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
STATE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BlockwiseLookup(Lookup):
    """Is a 4-bit lookup layout that knows ``state_dtype``: the name of the dtype the weight had when it was quantized.

    A checkpoint's ``quant_state`` names that dtype and upstream dequantizes to it, so a saved file must say what the loaded one
    said. Nothing is computed from it here.
    """

    state_dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_dtype not in STATE_DTYPES:
            raise LayoutError(f"bitsandbytes quantizes weights of {sorted(STATE_DTYPES)}, not {self.state_dtype!r}")


def nested_scales(group_size: int = NESTED_BLOCK_SIZE) -> Nested:
    """Describe double quantization: uint8 codes into a table, float32 absmax per ``group_size`` of them, one float32 offset."""
    return Nested(dtype="uint8", group=group_size, table=True, offset=True)


def blockwise(
    out_features: int, in_features: int, state_dtype: str, nested: Nested | None, group_size: int = BLOCK_SIZE
) -> BlockwiseLookup:
    """Return the 4-bit layout of an (out_features, in_features) matrix: absmax per ``group_size`` weights of the flattened matrix."""
    return BlockwiseLookup(
        out_features=out_features,
        in_features=in_features,
        bits=4,
        grid=Grid.flat_runs(group_size, in_features),
        scales_nested=nested,
        state_dtype=state_dtype,
    )
