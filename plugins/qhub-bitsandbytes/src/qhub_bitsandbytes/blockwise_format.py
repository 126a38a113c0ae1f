"""bitsandbytes' 4-bit entries: packed codes, absmax plain or nested, tables, and the JSON state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Grid, Layout, Lookup
from qhub.layouts.packing import pack, unpack
from qhub_bitsandbytes.entries import MARKERS, NAMES, STATE_NAMES, check_entries, check_finite
from qhub_bitsandbytes.layout import blockwise, nested_scales
from qhub_bitsandbytes.state import BLOCK_SIZES, STATE_DTYPES, State, read_state, write_state
from qhub_bitsandbytes.tables import QUANT_TYPES, quant_type_of

__all__ = ["BlockwiseFormat"]


class BlockwiseFormat(Format):
    """Translates FP4 and NF4 weights.

    ``weight`` (bytes, 1): codes of the flattened matrix, two a byte, the first in the high half; the bytes are seen as
    ``storage``, a dtype whose size divides their number. ``weight.absmax`` (ceil(N*K/64),) float32, or uint8 with
    ``weight.nested_absmax`` and ``weight.nested_quant_map``. ``weight.quant_map`` (16,) float32. The state names
    the rest.

    A file is believed about its block size, its table and whether its absmax is nested, as upstream believes it.
    The state's dtype is the dense weight's: what :meth:`pack` is told, and the model's own when it is loaded again.
    """

    def __init__(self, storage: torch.dtype = torch.uint8) -> None:
        self.storage = storage

    @property
    def markers(self) -> frozenset[str]:
        return MARKERS

    @property
    def names(self) -> frozenset[str]:
        return NAMES

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        count = -(-layout.out_features * layout.in_features // 2)
        return {
            "weight": Entry((count // self.storage.itemsize, 1), (self.storage,)),
            "weight.absmax": Entry(None, (torch.float32, torch.uint8)),
            "weight.quant_map": Entry((16,), (torch.float32,)),
            "weight.nested_absmax": Entry(None, (torch.float32,), required=False),
            "weight.nested_quant_map": Entry((256,), (torch.float32,), required=False),
            **{name: Entry(None, (torch.uint8,), required=False) for name in STATE_NAMES.values()},
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        layout.validate(parts)
        if not isinstance(layout, Lookup) or layout.bits != 4 or layout.transforms:
            raise LayoutError(
                f"bitsandbytes' 4-bit entries hold 4-bit codes into a table, this layout is {layout.describe()}"
            )
        group = layout.grid.cols
        if group not in BLOCK_SIZES or layout.grid != Grid.flat_runs(group, layout.in_features):
            raise LayoutError(
                f"bitsandbytes' blocks are runs of {sorted(BLOCK_SIZES)} weights, this layout has {layout.grid}"
            )
        quant_type = quant_type_of(parts["table"])
        if quant_type is None:
            raise LayoutError(
                f"bitsandbytes stores the tables {list(QUANT_TYPES)}, this one is {parts['table'].tolist()}"
            )
        state = State(quant_type, group, _state_dtype(dtype), (layout.out_features, layout.in_features))
        entries = {
            "weight": self._to_bytes(layout, parts).view(self.storage).unsqueeze(1),
            "weight.absmax": parts["scales"].reshape(-1),
            # Fused experts share one table in memory, and a file may not hold a tensor under two names.
            "weight.quant_map": parts["table"].clone(),
        }
        nested = layout.scales_nested
        if nested is None:
            entries["weight.absmax"] = entries["weight.absmax"].float()
        else:
            if nested != nested_scales(nested.group) or nested.group not in BLOCK_SIZES:
                raise LayoutError(
                    f"bitsandbytes nests scales in uint8 with a table and an offset, this layout has {nested}"
                )
            state = dataclasses.replace(
                state, nested_blocksize=nested.group, nested_offset=float(parts["scales_offset"])
            )
            entries["weight.nested_absmax"] = parts["scales_super"].float()
            entries["weight.nested_quant_map"] = parts["scales_table"].clone()
        return entries | {STATE_NAMES[quant_type]: write_state(state)}

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        check_entries(entries, self.entries(layout), "load_in_4bit")
        check_finite(entries, "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
        state = self._state(layout, entries)
        if quant_type_of(entries["weight.quant_map"]) != state.quant_type:
            raise LayoutError(
                f"entry 'weight.quant_map' is not the table of {state.quant_type}, which "
                f"{STATE_NAMES[state.quant_type]!r} names"
            )
        nested = nested_scales(state.nested_blocksize) if state.nested_blocksize is not None else None
        found = blockwise(layout.out_features, layout.in_features, nested, state.blocksize)
        parts = {"qweight": self._from_bytes(found, entries["weight"]), "table": entries["weight.quant_map"]}
        parts["scales"] = self._scales(found, entries)
        if state.nested_offset is not None:
            parts["scales_super"] = entries["weight.nested_absmax"]
            parts["scales_table"] = entries["weight.nested_quant_map"]
            parts["scales_offset"] = torch.tensor(
                state.nested_offset, dtype=torch.float32, device=entries["weight"].device
            )
        return found, parts

    def _state(self, layout: Layout, entries: Mapping[str, Tensor]) -> State:
        """Return the one state among ``entries``, checked against its own name and the planned shape."""
        present = {quant_type: name for quant_type, name in STATE_NAMES.items() if name in entries}
        if len(present) != 1:
            raise LayoutError(
                f"expected one of the entries {sorted(STATE_NAMES.values())}, found {sorted(present.values())}"
            )
        ((quant_type, name),) = present.items()
        state = read_state(name, entries[name])
        if state.quant_type != quant_type:
            raise LayoutError(f"entry {name!r} says quant_type={state.quant_type!r}, which its own name contradicts")
        if state.shape != (layout.out_features, layout.in_features):
            raise LayoutError(
                f"entry {name!r} says shape={list(state.shape)}, the model has [{layout.out_features}, "
                f"{layout.in_features}]"
            )
        nested = state.nested_blocksize is not None
        says = "nested" if nested else "not nested"
        for companion in ("weight.nested_absmax", "weight.nested_quant_map"):
            if (companion in entries) != nested:
                raise LayoutError(
                    f"entry {companion!r} is {'missing' if nested else 'present'}, but {name!r} says that absmax "
                    f"is {says}"
                )
        return state

    def _scales(self, layout: Lookup, entries: Mapping[str, Tensor]) -> Tensor:
        """Return the scales in the layout's shape, after their number and dtype have been compared with it."""
        absmax, nested = entries["weight.absmax"], layout.scales_nested
        expected = -(-layout.out_features * layout.in_features // layout.grid.cols)
        if absmax.shape != (expected,):
            raise LayoutError(
                f"entry 'weight.absmax' has shape {tuple(absmax.shape)}, expected ({expected},): one value per "
                f"{layout.grid.cols} weights"
            )
        dtype = torch.float32 if nested is None else torch.uint8
        if absmax.dtype != dtype:
            raise LayoutError(
                f"entry 'weight.absmax' has dtype {absmax.dtype}, expected {dtype} where the state says "
                f"{'nested' if nested else 'not nested'}"
            )
        if nested is None:
            check_finite(entries, "weight.absmax")
        else:
            supers = -(-expected // nested.group)
            if entries["weight.nested_absmax"].shape != (supers,):
                raise LayoutError(
                    f"entry 'weight.nested_absmax' has shape {tuple(entries['weight.nested_absmax'].shape)}, "
                    f"expected ({supers},)"
                )
        return absmax.reshape(layout.scale_shape)

    @staticmethod
    def _to_bytes(layout: Lookup, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the codes as upstream's bytes (ceil(N*K/2),) uint8."""
        if layout.in_features % 2 == 0:
            packed = parts["qweight"].reshape(-1)
        else:
            codes = layout.codes(parts).reshape(-1)
            # Upstream fills the last half byte with the code of 0.0, the lower one of FP4's two.
            if codes.shape[0] % 2:
                zero = torch.nonzero(parts["table"] == 0)[0].to(torch.uint8)
                codes = torch.cat([codes, zero])
            packed = pack(codes, 4)
        return (packed << 4) | (packed >> 4)

    @staticmethod
    def _from_bytes(layout: Lookup, weight: Tensor) -> Tensor:
        """Return the part ``qweight`` from upstream's ``weight`` entry, whatever its storage dtype."""
        stored = weight.contiguous().reshape(-1).view(torch.uint8)
        swapped = (stored << 4) | (stored >> 4)
        n, k = layout.out_features, layout.in_features
        return swapped.reshape(n, k // 2) if k % 2 == 0 else pack(unpack(swapped, 4, n * k).reshape(n, k), 4)


def _state_dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in STATE_DTYPES:
        raise LayoutError(
            f"bitsandbytes' 4-bit entries stand for {', '.join(STATE_DTYPES)} weights, not {name}: convert the model"
        )
    return name
