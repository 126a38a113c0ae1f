"""The ``quant_state`` entry: JSON in a uint8 tensor, as bitsandbytes writes it, parsed strictly."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub_bitsandbytes.tables import QUANT_TYPES, QuantType

__all__ = ["BLOCK_SIZES", "STATE_DTYPES", "State", "read_state", "write_state"]

# functional.py, quantize_4bit and dequantize_4bit, refuse any other.
BLOCK_SIZES = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})

# Dtypes of a weight that upstream quantizes to 4 bits, by the name it writes.
STATE_DTYPES = ("float32", "float16", "bfloat16")

# Upstream's are about 170 bytes long.
_MOST_BYTES = 1024
_KEYS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
_NESTED_KEYS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})


@dataclass(frozen=True)
class State:
    """Holds what the entry says.

    ``shape``: (N, K). ``dtype``: name of the dtype the weight had. ``nested_blocksize``, ``nested_offset``: None
    when the absmax is not quantized.
    """

    quant_type: QuantType
    blocksize: int
    dtype: str
    shape: tuple[int, int]
    nested_blocksize: int | None = None
    nested_offset: float | None = None


def write_state(state: State) -> Tensor:
    """Return the entry: (bytes,) uint8, byte for byte what upstream writes.

    Source: bitsandbytes functional.py, QuantState.as_dict(packed=True): the order of the keys, and Python's default
    separators.
    """
    values: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": state.dtype,
        "shape": list(state.shape),
    }
    if state.nested_blocksize is not None:
        values["nested_blocksize"] = state.nested_blocksize
        values["nested_dtype"] = "float32"
        values["nested_offset"] = state.nested_offset
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8, device="cpu")


def read_state(name: str, entry: Tensor) -> State:
    """Return what the entry ``name`` (bytes,) uint8 says.

    Raises :class:`LayoutError`, naming the entry, if it is too long, is not JSON, or has a missing, unknown,
    repeated or impossible value.
    """
    if entry.dtype != torch.uint8 or entry.ndim != 1 or not 0 < entry.numel() <= _MOST_BYTES:
        raise LayoutError(
            f"entry {name!r} is {entry.dtype} {tuple(entry.shape)}, expected 1 to {_MOST_BYTES} bytes of JSON in "
            "one dimension"
        )
    try:
        values = json.loads(bytes(entry.tolist()).decode("utf-8"), object_pairs_hook=_distinct)
    # RecursionError: a thousand opening brackets are valid input to the parser.
    except (ValueError, RecursionError) as error:
        raise LayoutError(
            f"entry {name!r} is not valid JSON ({type(error).__name__}: {error}): the file is damaged"
        ) from error
    if not isinstance(values, dict):
        raise LayoutError(f"entry {name!r} holds a JSON {type(values).__name__}, expected an object")
    nested = bool(_NESTED_KEYS & set(values))
    expected = _KEYS | _NESTED_KEYS if nested else _KEYS
    if set(values) != expected:
        missing, surplus = sorted(expected - set(values)), sorted(set(values) - expected)
        raise LayoutError(f"entry {name!r} holds the keys {sorted(values)}: missing {missing}, unknown {surplus}")
    return _checked(name, values, nested)


def _checked(name: str, values: dict[str, Any], nested: bool) -> State:
    def refuse(key: str, expected: str) -> LayoutError:
        return LayoutError(f"entry {name!r} says {key}={values[key]!r}, expected {expected}")

    if not isinstance(values["quant_type"], str) or values["quant_type"] not in QUANT_TYPES:
        raise refuse("quant_type", f"one of {list(QUANT_TYPES)}")
    if not _is_int(values["blocksize"]) or values["blocksize"] not in BLOCK_SIZES:
        raise refuse("blocksize", f"one of {sorted(BLOCK_SIZES)}")
    if not isinstance(values["dtype"], str) or values["dtype"] not in STATE_DTYPES:
        raise refuse("dtype", f"one of {sorted(STATE_DTYPES)}")
    shape = values["shape"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_int(size) and size > 0 for size in shape):
        raise refuse("shape", "two positive whole numbers")
    state = State(values["quant_type"], values["blocksize"], values["dtype"], (shape[0], shape[1]))
    if not nested:
        return state
    if not _is_int(values["nested_blocksize"]) or values["nested_blocksize"] not in BLOCK_SIZES:
        raise refuse("nested_blocksize", f"one of {sorted(BLOCK_SIZES)}")
    if values["nested_dtype"] != "float32":
        raise refuse("nested_dtype", "'float32'")
    offset = values["nested_offset"]
    # Python's parser lets NaN and Infinity through; the comparison does not.
    if not (_is_int(offset) or isinstance(offset, float)) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise refuse("nested_offset", "a finite float32 number")
    return dataclasses.replace(state, nested_blocksize=values["nested_blocksize"], nested_offset=float(offset))


def _is_int(value: Any) -> bool:
    # bool is a subclass of int, and JSON's true is no number.
    return isinstance(value, int) and not isinstance(value, bool)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values
