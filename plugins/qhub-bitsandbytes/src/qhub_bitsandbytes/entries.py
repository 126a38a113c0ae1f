"""The names of bitsandbytes' checkpoint entries, and the checks that both formats share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry
from qhub_bitsandbytes.tables import QUANT_TYPES

__all__ = ["MARKERS", "NAMES", "STATE_NAMES", "check_entries", "check_finite"]

# Source: bitsandbytes nn/modules.py, Linear4bit._save_to_state_dict and Linear8bitLt._save_to_state_dict.
STATE_NAMES = {quant_type: f"weight.quant_state.bitsandbytes__{quant_type}" for quant_type in QUANT_TYPES}
_TENSOR_NAMES = {"weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"}

# Both formats recognise either kind of weight: one that the config does not announce is then refused by name.
MARKERS = frozenset({"SCB", *STATE_NAMES.values()})
NAMES = MARKERS | {"weight", "weight_format"} | _TENSOR_NAMES


def check_entries(entries: Mapping[str, Tensor], expected: Mapping[str, Entry], asked: str) -> None:
    """Raise :class:`LayoutError` unless ``entries`` are those ``expected``, in shape and dtype.

    ``asked``: what the config asks for, for the message.
    """
    missing = sorted(name for name, entry in expected.items() if entry.required and name not in entries)
    surplus = sorted(set(entries) - set(expected))
    if missing or surplus:
        raise LayoutError(
            f"the config says {asked}, whose entries are {sorted(expected)}; found {sorted(entries)}: "
            f"missing {missing}, unknown {surplus}"
        )
    for name, tensor in entries.items():
        entry = expected[name]
        if entry.dtypes and tensor.dtype not in entry.dtypes:
            raise LayoutError(f"entry {name!r} has dtype {tensor.dtype}, expected one of {list(entry.dtypes)}")
        if entry.shape is not None and tuple(tensor.shape) != entry.shape:
            raise LayoutError(f"entry {name!r} has shape {tuple(tensor.shape)}, expected {entry.shape}")


def check_finite(entries: Mapping[str, Tensor], *names: str) -> None:
    """Raise :class:`LayoutError` if a float entry of ``names`` holds NaN or infinity; absent names are passed over."""
    for name in names:
        if name in entries and not bool(torch.isfinite(entries[name].float()).all()):
            raise LayoutError(f"entry {name!r} holds NaN or infinity: the file is damaged")
