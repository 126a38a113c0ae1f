"""Puts what a safetensors header says besides its tensors in order, so that the same model gives the same bytes.

safetensors writes metadata of several keys in an order that changes from call to call.
"""

from __future__ import annotations

import json
from pathlib import Path

from qhub.errors import CheckpointError

__all__ = ["sort_metadata"]

_LENGTH = 8


def sort_metadata(file: Path) -> None:
    """Sort the metadata in the header of ``file`` by key, in place; tensors stay where they are.

    Raises :class:`CheckpointError` when the header does not keep its size, which it does unless safetensors writes JSON
    in another way than this module.
    """
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(_LENGTH), "little")
        header = json.loads(opened.read(size))
        metadata = header.get("__metadata__", {})
        if len(metadata) < 2:
            return
        ordered = {**header, "__metadata__": dict(sorted(metadata.items()))}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise CheckpointError(f"{file}: its header of {size} bytes takes {len(text)} when it is sorted")
        opened.seek(_LENGTH)
        opened.write(text.ljust(size))
