"""The block types of ggml: what the bytes of a record mean, and how weights become such bytes."""

from __future__ import annotations

from qhub.errors import UnsupportedError
from qhub.layouts.blocks import Record
from qhub_gguf.records.floats import FLOATS
from qhub_gguf.records.kquants import K_QUANTS
from qhub_gguf.records.lattice import LATTICES
from qhub_gguf.records.legacy import LEGACY

__all__ = ["RECORDS", "record_of"]

RECORDS: dict[str, Record] = {record.name: record for record in (*LEGACY, *K_QUANTS, *FLOATS, *LATTICES)}
# llama.cpp rounds activations to these and never writes them.
_MEMORY = ("Q8_1", "Q8_K")


def record_of(name: str) -> Record:
    """Return the record of the ggml type ``name``. Raises :class:`UnsupportedError` for a type that has none."""
    record = RECORDS.get(name)
    if record is None:
        why = "exists in llama.cpp's memory only, not in files" if name in _MEMORY else "is no block type known here"
        raise UnsupportedError(f"the ggml type {name} {why}; known are {', '.join(RECORDS)}")
    return record
