"""Packed weights as tensors on their own: one entry of blocks. Files of the format are written as GGUF, not so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.formats import Entry, Format
from qhub.layouts import Layout

__all__ = ["BlocksFormat"]


class BlocksFormat(Format):
    """`X.blocks` uint8 (N, bytes of a row), as in the file."""

    markers = frozenset({"blocks"})  # type: ignore[assignment]
    names = frozenset({"blocks"})  # type: ignore[assignment]

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        return {"blocks": Entry(layout.part_specs()["blocks"].shape, (torch.uint8,))}

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"blocks": parts["blocks"]}

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        self.check(layout, entries, "its type")
        return layout, {"blocks": entries["blocks"]}
