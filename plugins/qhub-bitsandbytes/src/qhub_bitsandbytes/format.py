"""Picks the checkpoint format that a config names."""

from __future__ import annotations

from typing import Any

from qhub.formats import Format
from qhub_bitsandbytes.blockwise_format import BlockwiseFormat
from qhub_bitsandbytes.int8_format import Int8Format

__all__ = ["checkpoint_format"]


def checkpoint_format(config: Any) -> Format:
    """Return the format of the entries that ``config`` announces."""
    return Int8Format() if config.load_in_8bit else BlockwiseFormat(config.bnb_4bit_quant_storage)
