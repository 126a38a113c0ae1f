"""The two layouts: 4-bit codes under an absmax per block, and int8 codes under an absmax per row."""

from __future__ import annotations

from qhub.layouts import Activation, Affine, Grid, Lookup, Nested

__all__ = ["BLOCK_SIZE", "blockwise", "int8", "nested_scales"]

# transformers' integrations/bitsandbytes.py leaves bitsandbytes' default.
BLOCK_SIZE = 64


def nested_scales(group_size: int = 256) -> Nested:
    """Describe double quantization: uint8 codes into a table, an absmax per ``group_size`` of them, and an offset.

    Source: QLoRA (Dettmers et al. 2023), section 3; bitsandbytes functional.py, quantize_4bit, which takes 256.
    """
    return Nested(dtype="uint8", group=group_size, table=True, offset=True)


def blockwise(out_features: int, in_features: int, nested: Nested | None, group_size: int = BLOCK_SIZE) -> Lookup:
    """Return the 4-bit layout of an (out_features, in_features) matrix: w = absmax * table[code].

    A block is a run of ``group_size`` weights of the flattened matrix. ``nested``: how absmax is quantized; None
    for float32.
    """
    grid = Grid.flat_runs(group_size, in_features)
    return Lookup(out_features=out_features, in_features=in_features, bits=4, grid=grid, scales_nested=nested)


def int8(out_features: int, in_features: int, threshold: float) -> Affine:
    """Return the layout of LLM.int8(): w = codes * absmax / 127 per row, inputs rounded to int8 but for outliers.

    ``threshold``: magnitude from which an input counts as an outlier; 0 for none. ``scales`` hold the absmax
    (upstream's SCB). Upstream multiplies by 7.874015718698502e-3, the float32 nearest to 1/127, after codes * SCB
    (bitsandbytes _ops.py, int8_vectorwise_dequant); so does :meth:`Affine.decode` with ``unit``.
    """
    return Affine(
        out_features=out_features,
        in_features=in_features,
        bits=8,
        signed=True,
        grid=Grid("block", 1, in_features),
        unit=1.0 / 127.0,
        activation=Activation("int8", threshold=threshold),
    )
