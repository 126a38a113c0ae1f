"""Chooses how a product is cut, by its sizes: what was the fastest on an H100, and what must hold anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qhub.kernels import Problem
from qhub.layouts import Affine, Float8, Layout, Parts
from qhub_triton.eightbit.accepting import columns_of
from qhub_triton.eightbit.launching import Row, Tile
from qhub_triton.eightbit.library import Library, takes
from qhub_triton.launch import memory, overlaps, processors

__all__ = ["Choice", "Setting", "choice", "choice_of", "fitted", "tunables"]

Choice = Row | Tile | Library

_KINDS: dict[str, Any] = {"row": Row, "tile": Tile, "library": Library}


@dataclass(frozen=True)
class Setting:
    """Is what the choice depends on besides M.

    ``shared``: neighbours along K under the same scales, 0 for all; ``rows``: rows of the weight that share them;
    ``hopper``: launches may overlap; ``library``: cuBLAS takes it; ``processors``, ``memory``: of the GPU, the latter
    the bytes that a program may hold.
    """

    n: int
    k: int
    integer: bool
    outliers: bool
    shared: int
    group: int
    blocks: bool
    rows: int
    hopper: bool
    library: bool
    processors: int = 132
    memory: int = 227 << 10

    @staticmethod
    def of(layout: Layout, parts: Parts, dtype: torch.dtype, interpreted: bool) -> Setting:
        """Return the setting of a weight for inputs of ``dtype``."""
        assert isinstance(layout, (Affine, Float8))
        device = parts["qweight"].device
        gpu = device.type == "cuda" and not interpreted
        hopper = gpu and overlaps(device)
        sizes = {}
        if gpu:
            sizes = {"processors": processors(device), "memory": memory(device)}
        return Setting(
            n=layout.out_features,
            k=layout.in_features,
            integer=isinstance(layout, Affine),
            outliers=layout.activation.threshold > 0,
            shared=columns_of(layout),
            group=layout.activation.group,
            blocks=layout.scale_shape[-1] > 1,
            rows=min(layout.grid.rows, layout.out_features),
            hopper=hopper,
            library=hopper and takes(layout, parts, dtype),
            **sizes,
        )


def choice(setting: Setting, m: int) -> Choice:
    """Return how to multiply ``m`` rows."""
    tiles = -(-setting.n // 64)
    if setting.shared:
        return _scaled(setting, m, tiles)
    if m == 1 and (setting.outliers or (not setting.integer and tiles < 0.75 * setting.processors)):
        return Row(8, 1024, 4, 8, True) if setting.k <= 8192 else Row(16, 1024, 8, 8, True)
    if m <= 16:
        split = _split(setting, tiles, 256, 0.75)
        return _few(64, 16, 256, split, 6 if tiles * split <= setting.processors else 4)
    if m <= 32:
        split = _split(setting, tiles, 128, 0.4)
        if tiles > setting.processors:
            return _few(64, 32, 256, 1, 4)
        return _few(64, 32, 128, split, 14 if split == 1 else 8)
    if m <= 128:
        bm = 64 if tiles * -(-m // 64) <= setting.processors or m <= 64 else 128
        columns = -(-m // bm)
        split = _split(setting, tiles * columns, 128, 0.4)
        deep = tiles * columns * split <= setting.processors
        stages = (8 if deep else 4) if bm == 128 else (9 if m > 64 else 12) if deep else 6
        return _few(64, bm, 128, split, stages, ahead=1024)
    return _many(setting, m, tiles)


def _many(setting: Setting, m: int, tiles: int) -> Choice:
    """Return how to multiply more than 128 rows."""
    squares = -(-setting.n // 128) * -(-m // 128)
    if m <= 256 and tiles * -(-m // 128) <= setting.processors:
        return _few(64, 128, 128, 1, 8, ahead=1024, imprecise=0)
    if setting.library:
        return Library()
    if not setting.integer:
        return Tile(128, 256, 128, 1, 4, 8, imprecise=0)
    if squares > setting.processors:
        return Tile(128, 128, 128, 1, 3, 8)
    return _few(128, 128, 128, 1, 6, warps=8) if m <= 256 else Tile(64, 128, 128, 1, 4, 4)


def _scaled(setting: Setting, m: int, tiles: int) -> Choice:
    """Return how to multiply where scales change along K."""
    if setting.library and (m > 32 or (m > 1 and tiles > setting.processors)):
        return Library()
    if m <= 16:
        return _few(64, 16, 128, _split(setting, tiles, 128, 1.9), 7)
    if m <= 128:
        return _few(64, min(64, max(32, m)), 128, 1, 6)
    return Tile(64, 128, 128, 1, 3, 4)


def _few(bn: int, bm: int, bk: int, split: int, stages: int, warps: int = 4, **more: Any) -> Tile:
    """Return tiles for few rows, where the kernels' own starts and ends count."""
    return Tile(bn, bm, bk, split, stages, warps, pdl=True, chain=True, **more)


def _split(setting: Setting, tiles: int, bk: int, share: float) -> int:
    """Return how many programs to set on a tile, so that ``share`` of the processors have one, and four steps each."""
    split = 1
    while tiles * split < share * setting.processors and setting.k >= split * 8 * bk and split < 16:
        split *= 2
    return split


def choice_of(config: dict[str, Any]) -> Choice:
    """Return the choice that a config of :func:`tunables` stands for."""
    return _KINDS[config["kind"]](**{name: value for name, value in config.items() if name != "kind"})


def fitted(chosen: Choice, setting: Setting, m: int) -> Choice:
    """Return ``chosen``, changed where this weight or GPU does not allow it."""
    if isinstance(chosen, Library) and not setting.library:
        chosen = Tile(128, 128, 128, 1, 3, 8)
    if isinstance(chosen, Row):
        apart = setting.blocks and setting.rows % chosen.bn
        if m == 1 and not apart and (not setting.group or chosen.bk % setting.group == 0):
            return chosen._replace(chain=chosen.chain and setting.hopper)
        chosen = Tile(64, 16, 128, 1, 4, 4)
    if isinstance(chosen, Tile):
        bk = chosen.bk
        while setting.shared and setting.shared % bk:
            bk //= 2
        hopper = setting.hopper
        return chosen._replace(
            bk=bk,
            stages=min(chosen.stages, max(2, setting.memory // ((chosen.bn + chosen.bm) * bk))),
            ahead=chosen.ahead if hopper else 0,
            pdl=chosen.pdl and hopper,
            chain=chosen.chain and hopper,
        )
    return chosen


def tunables(problem: Problem, parts: Parts, m: int) -> dict[str, dict[str, Any]]:
    """Return configs worth measuring for inputs of ``m`` rows, by name."""
    setting = Setting.of(problem.layout, parts, problem.dtype, False)
    found: dict[str, Choice] = {}
    if m == 1:
        found |= {"row8": Row(8, 1024, 4, 8, True), "row16": Row(16, 1024, 8, 8, True)}
    bm = next((one for one in (16, 32, 64) if m <= one), 128)
    if m <= 256:
        for bk, split, stages in ((128, 1, 4), (128, 1, 9), (128, 2, 6), (256, 1, 4), (256, 2, 4), (256, 4, 4)):
            found[f"64x{bm}x{bk}/{split}-{stages}"] = _few(64, bm, bk, split, stages, ahead=1024 if m > 32 else 0)
    if m > 64:
        found["128x128"] = Tile(128, 128, 128, 1, 3, 8)
        found["64x128"] = Tile(64, 128, 128, 1, 4, 4)
        if not setting.integer:
            found["128x256-fast"] = Tile(128, 256, 128, 1, 4, 8, imprecise=0)
    if setting.library:
        found |= {"library": Library(), "library-exact": Library(False)}
    names = {kind: name for name, kind in _KINDS.items()}
    return {
        name: {"kind": names[type(one)], **fitted(one, setting, m)._asdict()}
        for name, one in found.items()
        if type(fitted(one, setting, m)) is type(one)
    }
