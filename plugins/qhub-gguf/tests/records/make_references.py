"""Writes data/references.safetensors with llama.cpp's own code: python make_references.py PATH/libggml-base.so WEIGHTS

The library comes with llama-cpp-python; WEIGHTS is a safetensors file whose first matrix of 512 columns is used. For
every block type: random records and the weights that ggml reads in them (TYPE.records, TYPE.decoded), and what ggml
makes of the weights (TYPE.written). Where gguf-py is installed, its decoder has to agree.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import torch
from qhub_gguf.types import TYPES
from safetensors import safe_open
from safetensors.torch import save_file

ROWS, COLUMNS = 2, 512


class Ggml:
    """Calls the library."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def decode(self, name: str, records: np.ndarray, count: int) -> np.ndarray:
        weights = np.empty(count, np.float32)
        function = getattr(self.library, f"dequantize_row_{name.lower().replace('_k', '_K')}")
        function(_pointer(records), _pointer(weights), ctypes.c_int64(count))
        return weights

    def encode(self, name: str, weights: np.ndarray, size: int) -> np.ndarray:
        rows, columns = weights.shape
        records = np.empty((rows, size), np.uint8)
        # Some types are refused without an importance matrix; this one says nothing.
        flat = np.ones(columns, np.float32) if name in ("IQ2_XXS", "IQ2_XS", "IQ1_S") else None
        self.library.ggml_quantize_chunk(
            TYPES[name].id, _pointer(weights), _pointer(records), ctypes.c_int64(0), ctypes.c_int64(rows),
            ctypes.c_int64(columns), None if flat is None else _pointer(flat),
        )  # fmt: skip
        return records


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def main() -> None:
    ggml = Ggml(sys.argv[1])
    with safe_open(sys.argv[2], "pt") as file:
        matrices = (file.get_tensor(name) for name in sorted(file.keys()))
        weights = next(m for m in matrices if m.ndim == 2 and m.shape[1] == COLUMNS)[:8].half().float().numpy()
    rng = np.random.default_rng(0)
    data = {"weights": torch.from_numpy(weights).half()}
    for name, kind in TYPES.items():
        if kind.dtype is not None or name in ("Q8_1", "Q8_K"):
            continue
        per_row = COLUMNS // kind.count
        records = rng.integers(0, 256, (ROWS * per_row, kind.size), np.uint8)
        decoded = np.stack([ggml.decode(name, record, kind.count) for record in records])
        # A scale of random bits may be NaN or infinite: such records are drawn again. So is NVFP4's NaN with a sign.
        while (bad := ~np.isfinite(decoded).all(1) | (name == "NVFP4") & (records[:, :4] == 255).any(1)).any():
            records[bad] = rng.integers(0, 256, (bad.sum(), kind.size), np.uint8)
            decoded = np.stack([ggml.decode(name, record, kind.count) for record in records])
        _agree(name, records, decoded)
        data[f"{name}.records"] = torch.from_numpy(records.reshape(ROWS, -1))
        data[f"{name}.decoded"] = torch.from_numpy(decoded.reshape(ROWS, COLUMNS))
        data[f"{name}.written"] = torch.from_numpy(ggml.encode(name, weights, per_row * kind.size))
    target = Path(__file__).parent / "data/references.safetensors"
    save_file(data, target)
    print(target, target.stat().st_size, "bytes,", len(data), "tensors")


def _agree(name: str, records: np.ndarray, decoded: np.ndarray) -> None:
    try:
        import gguf
    except ImportError:
        return
    kind = getattr(gguf.GGMLQuantizationType, name, None)
    try:
        other = None if kind is None else gguf.dequantize(records, kind)
    except NotImplementedError:
        return
    assert other is None or np.array_equal(other.view(np.int32), decoded.view(np.int32)), name


if __name__ == "__main__":
    main()
