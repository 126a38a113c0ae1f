"""hqq's checkpoint entries: packed codes, scales, zeros, and the settings of the layer as tensors.

Source: hqq 0.2.8, ``HQQLinear.state_dict`` and ``load_state_dict`` (hqq/core/quantize.py), ``encode_safetensor_type``
(hqq/core/utils.py). hqq rebuilds a layer from these entries alone and never looks at config.json::

    W_q                                     (packed_rows(R), C) uint8 or int32, or the same bytes under a float dtype
    scale, zero                             (R, 1), (1, C) or (), in the compute dtype
    nbits, group_size, axis                 int32 scalars
    shape                                   int64 [N, K]
    packing, unpack_view_dtype, compute_dtype    ASCII as uint8
    the flags                               uint8 scalars
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import ConfigError, LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Affine, Layout
from qhub_hqq.settings import Settings, code_shape, settings_on
from qhub_hqq.slabs import PACKING, pack_slabs, packed_rows, unpack_slabs, word_dtype

__all__ = ["HqqFormat"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NUMBERS = ("nbits", "group_size", "axis")
_FLAGS = (
    "channel_wise",
    "optimize",
    "round_zero",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
)
_STRINGS = ("packing", "unpack_view_dtype", "compute_dtype")
# The longest string that hqq writes is "torch.bfloat16".
_LONGEST = 32


class HqqFormat(Format):
    """Translates between the parts of an affine layout and the entries that ``HQQLinear`` writes and reads.

    ``settings``: of the config, by layer tag. With one setting for all layers the file must agree with it. With
    settings per layer the file's own metadata decides: hqq reads nothing else, and the experts of a file do not have
    the tags of the fused weights that were quantized.
    """

    def __init__(self, settings: Mapping[str | None, Settings]) -> None:
        self._settings = settings
        self._per_layer = None not in settings

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({"W_q"})

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"W_q", "scale", "zero", "shape", *_NUMBERS, *_FLAGS, *_STRINGS})

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        assert isinstance(layout, Affine)
        # Stored as float or not, and by other settings where they differ by layer: unpack compares the shapes.
        scales = None if self._per_layer else _scale_shape(layout)
        return {
            "W_q": Entry(None, (torch.uint8, torch.int32, *_FLOATS)),
            "scale": Entry(scales, _FLOATS),
            "zero": Entry(scales, _FLOATS),
            "shape": Entry((2,), (torch.int64,), required=False),
            **{name: Entry((), (torch.int32,), required=False) for name in _NUMBERS},
            **{name: Entry((), (torch.uint8,), required=False) for name in _FLAGS},
            **{name: Entry(None, (torch.uint8,), required=False) for name in _STRINGS},
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(layout, Affine)
        settings = settings_on(layout, self._settings)
        n, k = layout.out_features, layout.in_features
        # hqq computes in the dtype of its scales: what they are stored in is the compute dtype, whatever the model's.
        compute_dtype = parts["scales"].dtype
        words = pack_slabs(layout.codes(parts).reshape(code_shape(layout)), layout.bits)
        shape = _scale_shape(layout)
        flags = {
            "channel_wise": settings.channel_wise,
            "optimize": settings.optimize,
            "round_zero": settings.round_zero,
            "view_as_float": settings.view_as_float,
            "quant_scale": False,
            "quant_zero": False,
            "offload_meta": False,
            "encoded_state_dict": True,
            "stores_quant_config": True,
        }
        numbers = {"nbits": layout.bits, "group_size": settings.group(n, k), "axis": settings.axis}
        strings = {
            "packing": PACKING[layout.bits],
            "unpack_view_dtype": str(word_dtype(layout.bits)),
            "compute_dtype": str(compute_dtype),
        }
        return {
            "W_q": words.view(compute_dtype) if settings.view_as_float else words,
            "scale": parts["scales"].reshape(shape),
            "zero": parts["zeros"].to(compute_dtype).reshape(shape),
            "shape": torch.tensor([n, k]),
            **{name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()},
            **{name: torch.tensor(int(value), dtype=torch.uint8) for name, value in flags.items()},
            **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in strings.items()},
        }

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        assert isinstance(layout, Affine)
        missing = [name for name in ("W_q", "scale", "zero") if name not in entries]
        if missing:
            raise LayoutError(f"an hqq weight needs the entries W_q, scale and zero; missing: {missing}")
        stored = self._stored_layout(layout, entries)
        bits, (rows, columns) = stored.bits, code_shape(stored)
        words = _words(entries, bits, (packed_rows(rows, bits), columns))
        shape = _scale_shape(stored)
        for name in ("scale", "zero"):
            if tuple(entries[name].shape) != shape or entries[name].dtype not in _FLOATS:
                raise LayoutError(
                    f"entry {name!r} is {entries[name].dtype} {tuple(entries[name].shape)}, expected float32, float16 "
                    f"or bfloat16 {shape} for {_words_of(stored)}"
                )
        if entries["scale"].dtype != entries["zero"].dtype:
            raise LayoutError(
                f"entries 'scale' and 'zero' have dtypes {entries['scale'].dtype} and {entries['zero'].dtype}: hqq "
                "stores both in its compute dtype"
            )
        codes = unpack_slabs(words, bits, rows).reshape(stored.out_features, stored.in_features)
        return stored, {
            "qweight": stored.pack_codes(codes),
            "scales": entries["scale"].reshape(stored.scale_shape),
            "zeros": entries["zero"].reshape(stored.scale_shape),
        }

    def _stored_layout(self, planned: Affine, entries: Mapping[str, Tensor]) -> Affine:
        """Return the layout that the metadata describe; what they leave out is as planned."""
        settings = settings_on(planned, self._settings)
        n, k = planned.out_features, planned.in_features
        if "shape" in entries:
            found = _integers("shape", entries["shape"], 2)
            if found != (n, k):
                raise LayoutError(f"entry 'shape' says {found[0]}x{found[1]}, the model's weight is {n}x{k}")
        for name in ("quant_scale", "quant_zero", "offload_meta"):
            if name in entries and _integers(name, entries[name], 1) != (0,):
                raise LayoutError(f"entry {name!r} is set: quantized or offloaded scales and zeros cannot be read")
        numbers = {name: _integers(name, entries[name], 1)[0] for name in _NUMBERS if name in entries}
        nbits, axis = numbers.get("nbits", planned.bits), numbers.get("axis", settings.axis)
        group_size = numbers.get("group_size", settings.group(n, k))
        channel_wise = settings.channel_wise
        if "channel_wise" in entries:
            channel_wise = bool(_integers("channel_wise", entries["channel_wise"], 1)[0])
        if nbits not in PACKING or axis not in (0, 1) or group_size < 1:
            raise LayoutError(
                f"the metadata say nbits={nbits}, axis={axis}, group_size={group_size}: hqq has no such layout, the "
                "file is damaged"
            )
        try:
            stored = Settings(nbits, group_size, axis, channel_wise).layout(n, k, "the weight")
        except ConfigError as error:
            said = f"nbits={nbits}, axis={axis}, group_size={group_size}"
            raise LayoutError(f"the metadata say {said}: {error}") from error
        stored = dataclasses.replace(planned, bits=stored.bits, grid=stored.grid)
        if stored != planned and not self._per_layer:
            raise LayoutError(
                f"the metadata describe {_words_of(stored)}, the config {_words_of(planned)}: one of the two is of "
                "another model"
            )
        for name, expected in (("packing", PACKING[nbits]), ("unpack_view_dtype", str(word_dtype(nbits)))):
            if name in entries and (text := _string(name, entries[name])) != expected:
                raise LayoutError(f"entry {name!r} says {text!r}; {nbits}-bit codes are stored as {expected!r}")
        return stored


def _scale_shape(layout: Affine) -> tuple[int, ...]:
    """Return the shape that hqq keeps its scales in: they broadcast against the matrix of codes."""
    rows, columns = code_shape(layout)
    if layout.grid.kind == "block" and layout.grid.rows > 1:
        return ()
    return (1, columns) if layout.grid.kind == "strided" else (rows, 1)


def _words(entries: Mapping[str, Tensor], bits: int, shape: tuple[int, int]) -> Tensor:
    """Return the packed words of ``shape``, taken out of a float view if they were stored under one."""
    words, dtype = entries["W_q"], word_dtype(bits)
    if words.dtype in _FLOATS and words.ndim == 2:
        if "view_as_float" in entries and not _integers("view_as_float", entries["view_as_float"], 1)[0]:
            raise LayoutError(f"entry 'W_q' is {words.dtype}, and 'view_as_float' says that it is {dtype}")
        if words.shape[1] * words.element_size() % dtype.itemsize == 0:
            words = words.contiguous().view(dtype)
    if words.dtype != dtype or tuple(words.shape) != shape:
        raise LayoutError(
            f"entry 'W_q' is {entries['W_q'].dtype} {tuple(entries['W_q'].shape)}, expected {dtype} {shape} or as many "
            f"bytes under a float dtype for {bits}-bit codes"
        )
    return words


def _words_of(layout: Affine) -> str:
    """Return the layout in hqq's words."""
    grid = layout.grid
    groups = f"axis {0 if grid.kind == 'strided' else 1}, groups of {grid.cols}"
    return f"{layout.bits} bits, " + ("one scale for the matrix" if grid.kind == "block" and grid.rows > 1 else groups)


def _integers(name: str, value: Tensor, count: int) -> tuple[int, ...]:
    if value.is_floating_point() or value.is_complex() or value.numel() != count:
        raise LayoutError(f"entry {name!r} is {value.dtype} {tuple(value.shape)}, expected {count} whole number(s)")
    return tuple(int(number) for number in value.flatten().tolist())


def _string(name: str, value: Tensor) -> str:
    if value.dtype != torch.uint8 or value.ndim != 1 or value.numel() > _LONGEST:
        found = f"{value.dtype} {tuple(value.shape)}"
        raise LayoutError(f"entry {name!r} is {found}, expected up to {_LONGEST} ASCII codes in uint8")
    return bytes(value.tolist()).decode("ascii", errors="replace")
