"""Every ggml type that a GGUF file can name: its number, its name and how many bytes hold how many weights.

Source: ``enum ggml_type`` of ggml.h and the block structs of ggml-common.h (llama.cpp, July 2026).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["REMOVED", "TYPES", "GgmlType", "type_of", "type_of_dtype"]


@dataclass(frozen=True)
class GgmlType:
    """Describes one type: ``count`` weights in ``size`` bytes; ``dtype``: of plain numbers, None for blocks."""

    id: int
    name: str
    count: int
    size: int
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> float:
        """Return the bits that one weight takes."""
        return 8 * self.size / self.count

    def row_bytes(self, features: int) -> int:
        """Return the bytes of a row of ``features`` weights, a multiple of ``count``."""
        return features // self.count * self.size


_PLAIN = (
    (0, "F32", torch.float32),
    (1, "F16", torch.float16),
    (24, "I8", torch.int8),
    (25, "I16", torch.int16),
    (26, "I32", torch.int32),
    (27, "I64", torch.int64),
    (28, "F64", torch.float64),
    (30, "BF16", torch.bfloat16),
)
_BLOCKS = (
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (29, "IQ1_M", 256, 56),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
)

_ALL = tuple(GgmlType(number, name, 1, dtype.itemsize, dtype) for number, name, dtype in _PLAIN) + tuple(
    GgmlType(number, name, count, size) for number, name, count, size in _BLOCKS
)

TYPES: dict[str, GgmlType] = {kind.name: kind for kind in sorted(_ALL, key=lambda kind: kind.id)}

_BY_ID = {kind.id: kind for kind in _ALL}

# Numbers that llama.cpp used once and gave up, for messages.
REMOVED = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

_BY_DTYPE = {kind.dtype: kind for kind in _ALL if kind.dtype is not None}


def type_of(name_or_id: str | int) -> GgmlType | None:
    """Return the type of that name or number; None if there is none."""
    return TYPES.get(name_or_id) if isinstance(name_or_id, str) else _BY_ID.get(name_or_id)


def type_of_dtype(dtype: torch.dtype) -> GgmlType | None:
    """Return the type of plain numbers of ``dtype``; None if GGUF has none."""
    return _BY_DTYPE.get(dtype)
