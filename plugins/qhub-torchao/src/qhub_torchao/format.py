"""torchao's checkpoint entries: its tensors taken apart, and what the header says of them.

Source: torchao 0.18, ``prototype/safetensors``, as transformers 5.23 writes it (``quantizers/quantizer_torchao.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qhub.errors import ConfigError, LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Affine, Layout
from qhub.layouts.transforms import with_input_scale
from qhub_torchao import header, names, packed, plain
from qhub_torchao.reading import settings_by_name, settings_for
from qhub_torchao.settings import Settings

__all__ = ["TorchAoFormat"]

_PACKED = ("int4", "tiles", "words")


class TorchAoFormat(Format):
    """Translates between layouts and the flattened tensors of torchao; which tensor it is the config says."""

    def __init__(self, config: Any) -> None:
        self.config = config
        settings_by_name(config)

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({names.QDATA})

    @property
    def names(self) -> frozenset[str]:
        return names.ALL

    @property
    def stacks(self) -> Mapping[str, str]:
        return names.STACKS

    @property
    def stack_lead(self) -> str:
        return "_"

    @property
    def always_stacks(self) -> bool:
        return True

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        settings = settings_for(self.config, layout)
        if settings.storage in _PACKED and isinstance(layout, Affine):
            found = packed.entries(layout, settings)
        else:
            found = plain.entries(layout, settings)
        # AWQ's and SmoothQuant's factors of the input, where one of torchao's prototypes has left them.
        return found if settings.storage == "intx" else {**found, names.ACT_PRE_SCALE: Entry(None, required=False)}

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        settings = self._settings(layout)
        layout.validate(parts)
        if settings.storage in _PACKED and isinstance(layout, Affine):
            entries = packed.pack(layout, settings, parts)
        else:
            entries = plain.pack(layout, parts)
        if "in_scale" in parts:
            entries[names.ACT_PRE_SCALE] = parts["in_scale"]
        return entries

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        settings = self._settings(layout)
        self.check(layout, entries, "this torchao config")
        for name in (names.SCALE, names.SCALE_AND_ZERO):
            if name in entries:
                scales = entries[name][..., 0] if name == names.SCALE_AND_ZERO else entries[name]
                _check_scales(name, scales)
        if settings.storage in _PACKED and isinstance(layout, Affine):
            parts = packed.unpack(layout, settings, entries)
        else:
            layout, parts = plain.unpack(layout, entries)
        if names.ACT_PRE_SCALE in entries:
            factors = entries[names.ACT_PRE_SCALE]
            if factors.numel() != layout.in_features or not factors.is_floating_point():
                raise LayoutError(
                    f"entry {names.ACT_PRE_SCALE!r} is {factors.dtype} {tuple(factors.shape)}, expected a factor for "
                    f"each of {layout.in_features} input features"
                )
            layout, parts["in_scale"] = with_input_scale(layout), factors.reshape(-1)
        return layout, parts

    def metadata(self, weights: Mapping[str, tuple[Layout, torch.dtype]], dense: Iterable[str]) -> dict[str, str]:
        described = {
            name: header.describe(layout, self._settings(layout), dtype, _fused(name))
            for name, (layout, dtype) in weights.items()
        }
        return header.written(described, dense)

    def check_metadata(self, metadata: Mapping[str, str], layouts: Mapping[str, Layout]) -> list[str]:
        problems = []
        for name, layout in layouts.items():
            if name in metadata:
                expected = header.describe(layout, settings_for(self.config, layout), None, _fused(name))
                problems += header.contradictions(name, metadata[name], expected)
        return problems

    def _settings(self, layout: Layout) -> Settings:
        try:
            return settings_for(self.config, layout)
        except ConfigError as error:
            raise LayoutError(str(error)) from error


def _fused(parameter: str) -> bool:
    return not parameter.endswith(".weight")


def _check_scales(name: str, scales: Tensor) -> None:
    if scales.device.type == "meta":
        return
    scales = scales.float()
    bad = (scales == 0) | ~torch.isfinite(scales)
    if bool(bad.any()):
        raise LayoutError(f"entry {name!r} holds the scale {float(scales[bad][0])}: the file is damaged")
