"""What an HQQ config says of one layer, and the layout that follows from it.

The names and defaults are those of hqq 0.2.8 (``hqq/core/quantize.py``, ``hqq_base_quant_config`` and
``Quantizer.quantize``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts import Affine, Grid, Layout

__all__ = [
    "CODES_PER_WORD",
    "Settings",
    "base_config",
    "code_shape",
    "disagreement",
    "ignore",
    "is_per_layer",
    "settings_of",
    "settings_on",
]

NBITS = (8, 4, 3, 2, 1)

# How many codes hqq packs into one word along the first dimension (hqq/core/bitpack.py).
CODES_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}

_WEIGHT_KEYS = ("nbits", "channel_wise", "group_size", "optimize", "round_zero", "axis", "view_as_float")
_LAYER_KEYS = frozenset({"weight_quant_params", "scale_quant_params", "zero_quant_params", "offload_meta"})


@dataclass(frozen=True)
class Settings:
    """Says how one layer is quantized and stored.

    ``nbits``: 8, 4, 3, 2 or 1. ``group_size``: weights that share a scale; None: a whole row (axis 1) or column (axis
    0). ``axis``: 1: runs of the flattened matrix, 0: columns of the flattened matrix seen as (group_size, rest).
    ``channel_wise``: False: one scale for the whole matrix, which is then not optimized. ``optimize``: whether the
    zeros are fitted by the half-quadratic solver; False: plain min/max. ``round_zero``: whether the zeros are rounded
    before that. ``view_as_float``: whether the packed codes are stored under a float dtype.
    """

    nbits: int = 4
    group_size: int | None = 64
    axis: int = 1
    channel_wise: bool = True
    optimize: bool = True
    round_zero: bool = True
    view_as_float: bool = False

    @classmethod
    def parse(cls, values: Any, where: str) -> Settings:
        """Return the settings in ``values``, one layer's dictionary as hqq's BaseQuantizeConfig makes it.

        ``where``: names the dictionary in messages. Raises :class:`ConfigError` on an unknown key or an impossible
        value.
        """
        if not isinstance(values, Mapping) or "weight_quant_params" not in values:
            raise ConfigError(
                f"{where} of an hqq config is {values!r}: it must be a dictionary with the key 'weight_quant_params', "
                "as HqqConfig(nbits=..., group_size=...) makes it"
            )
        unknown = sorted(set(values) - _LAYER_KEYS)
        params = values["weight_quant_params"]
        if not isinstance(params, Mapping):
            raise ConfigError(f"weight_quant_params in {where} of an hqq config is {params!r}: it must be a dictionary")
        unknown += sorted(set(params) - set(_WEIGHT_KEYS))
        missing = sorted({"nbits", "group_size", "axis"} - set(params))
        if unknown or missing:
            raise ConfigError(
                f"{where} of an hqq config has unknown keys {unknown} and lacks {missing}; it knows "
                f"{sorted(_LAYER_KEYS)} and, in weight_quant_params, {list(_WEIGHT_KEYS)}"
            )
        flags = {}
        # What hqq's Quantizer.quantize does where the dictionary says nothing.
        for name, default in (
            ("channel_wise", True),
            ("optimize", True),
            ("round_zero", False),
            ("view_as_float", False),
        ):
            flags[name] = params.get(name, default)
            if not isinstance(flags[name], bool):
                raise ConfigError(f"{name}={flags[name]!r} in {where} of an hqq config: it is True or False")
        settings = cls(nbits=params["nbits"], group_size=params["group_size"], axis=params["axis"], **flags)
        settings._verify(where)
        return settings

    def _verify(self, where: str) -> None:
        if type(self.nbits) is not int or self.nbits not in NBITS:
            raise ConfigError(f"nbits={self.nbits!r} in {where} of an hqq config: it is one of {NBITS}")
        if type(self.axis) is not int or self.axis not in (0, 1):
            raise ConfigError(f"axis={self.axis!r} in {where} of an hqq config: it is 0 or 1")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise ConfigError(
                f"group_size={self.group_size!r} in {where} of an hqq config: it is a positive number, or None for "
                "whole rows (axis 1) or columns (axis 0)"
            )
        if not self.channel_wise and self.nbits == 3:
            # hqq cuts the padding of 3-bit codes off by the group size, which says nothing here.
            raise ConfigError(
                f"nbits=3, channel_wise=False in {where} of an hqq config: hqq could not read the file back"
            )

    def group(self, out_features: int, in_features: int) -> int:
        """Return the group size with None resolved as ``HQQLinear.initialize`` does."""
        if self.group_size is not None:
            return self.group_size
        return in_features if self.axis == 1 else out_features

    def layout(self, out_features: int, in_features: int, where: str) -> Affine:
        """Return the layout of an (out_features, in_features) matrix; raises :class:`ConfigError` naming ``where``."""
        group = self.group(out_features, in_features)
        size = f"{where} ({out_features}x{in_features})"
        if out_features * in_features % group:
            raise ConfigError(
                f"group_size={group} does not divide the {out_features * in_features} weights of {size}: choose one "
                "that does, or list the module in skip_modules"
            )
        if not self.channel_wise:
            grid = Grid("block", out_features, in_features)
        elif self.axis == 1:
            grid = Grid.flat_runs(group, in_features)
        else:
            grid = Grid("strided", 1, group)
        layout = Affine(
            out_features=out_features, in_features=in_features, bits=self.nbits, grid=grid, zero="value", math="scales"
        )
        rows = code_shape(layout)[0]
        per_word = CODES_PER_WORD[self.nbits]
        if self.nbits != 3 and rows % per_word:
            raise ConfigError(
                f"hqq packs {per_word} rows of {self.nbits}-bit codes into one, and {size} has {rows} of them with "
                f"group_size={self.group_size}, axis={self.axis}: choose another group size, or list the module in "
                "skip_modules"
            )
        return layout


def code_shape(layout: Affine) -> tuple[int, int]:
    """Return the shape of the matrix of codes that hqq packs: one row a group (axis 1), or one column (axis 0)."""
    grid, count = layout.grid, layout.out_features * layout.in_features
    if grid.kind == "strided":
        return grid.cols, count // grid.cols
    if grid.kind == "block" and grid.rows > 1:
        return layout.out_features, layout.in_features
    return count // grid.cols, grid.cols


def base_config(
    nbits: Any = 4,
    group_size: Any = 64,
    quant_zero: bool = False,
    quant_scale: bool = False,
    offload_meta: bool = False,
    view_as_float: Any = False,
    axis: Any = 1,
) -> dict[str, Any]:
    """Return one layer's dictionary as hqq's ``BaseQuantizeConfig`` makes it.

    ``quant_zero``, ``quant_scale``, ``offload_meta``: given up by hqq; a warning says that they change nothing. Raises
    :class:`ConfigError` on bad values.
    """
    given_up = {"quant_zero": quant_zero, "quant_scale": quant_scale, "offload_meta": offload_meta}
    if any(given_up.values()):
        ignore(name for name, value in given_up.items() if value)
    if isinstance(group_size, int) and group_size % 8:
        raise ConfigError(f"group_size={group_size} of an hqq config: it must be a multiple of 8")
    weight = {
        "nbits": nbits,
        "channel_wise": True,
        "group_size": group_size,
        "optimize": True,
        "round_zero": nbits == 4,
        "axis": axis,
        "view_as_float": view_as_float,
    }
    values = {
        "weight_quant_params": weight,
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }
    Settings.parse(values, "quant_config")
    return values


def ignore(names: Iterable[str]) -> None:
    """Warn that the settings ``names`` change nothing."""
    warnings.warn(
        f"hqq config: {', '.join(names)} is ignored, as hqq 0.2.8 itself does or must to save a model: scales and "
        "zeros stay in the model's dtype, beside the weights",
        stacklevel=3,
    )


def is_per_layer(quant_config: Any) -> bool:
    """Return whether ``quant_config`` holds one dictionary per layer tag (``dynamic_config``), not one for all."""
    return isinstance(quant_config, Mapping) and "weight_quant_params" not in quant_config and bool(quant_config)


def settings_of(config: Any) -> dict[str | None, Settings]:
    """Return ``{layer tag: settings}`` of an HqqConfig; the one key None where all layers share them.

    Raises :class:`ConfigError` on an unknown key or an impossible value.
    """
    values = config.quant_config
    if not is_per_layer(values):
        return {None: Settings.parse(values, "quant_config")}
    return {tag: Settings.parse(one, f"quant_config[{tag!r}]") for tag, one in values.items()}


def settings_on(layout: Layout, settings: Mapping[str | None, Settings]) -> Settings:
    """Return those of ``settings`` that ``layout`` was planned from.

    A layout has no place for ``optimize``, ``round_zero`` and ``view_as_float``; entries that share a layout must agree
    on them (see :func:`disagreement`). A layout that none of them gives, read from a file, gets hqq's defaults.
    """
    assert isinstance(layout, Affine)
    for one in settings.values():
        if same_layout(one, layout):
            return one
    grid = layout.grid
    if grid.kind == "block" and grid.rows > 1:
        return Settings(layout.bits, None, 1, channel_wise=False, optimize=False, round_zero=layout.bits == 4)
    return Settings(layout.bits, grid.cols, 0 if grid.kind == "strided" else 1, round_zero=layout.bits == 4)


def same_layout(settings: Settings, layout: Affine) -> bool:
    """Return whether ``settings`` give ``layout`` for its shape."""
    try:
        planned = settings.layout(layout.out_features, layout.in_features, "")
    except ConfigError:
        return False
    return (planned.grid, planned.bits) == (layout.grid, layout.bits)


def disagreement(settings: Iterable[Settings]) -> tuple[Settings, Settings] | None:
    """Return two of ``settings`` that give equal layouts and differ elsewhere; None when there are none."""
    seen: dict[tuple[Any, ...], Settings] = {}
    for one in settings:
        key = (one.nbits, one.group_size, one.axis, one.channel_wise)
        if seen.setdefault(key, one) != one:
            return seen[key], one
    return None
