"""Plans of the kernels for tiles: every part has work, every stage has its memory."""

from __future__ import annotations

import pytest
from qhub_triton.tiled.plans import (
    Few,
    Many,
    Plan,
    Size,
    Tile,
    Wide,
    config_of,
    plan,
    plan_of,
    within,
)
from qhub_triton.tiled.trials import candidates, probed
from qhub_triton.wide.tiles import scaled_late, tiles_of

from qhub.layouts import Affine, Float8, Grid, Lookup
from qhub.layouts.tiled import Tiled

# Tiles of weights that are no work to widen, and of others.
EVEN = (Tile(128, 4, 1.0), Tile(256, 2, 0.98))
LOOKED_UP = (Tile(128, 4, 0.62), Tile(256, 2, 0.85))


@pytest.mark.parametrize("wide", [(), EVEN, LOOKED_UP])
@pytest.mark.parametrize("kind", ["plain", "nested", "zeros", "looked_up"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("memory", [227 << 10, 99 << 10, 64 << 10], ids=["H100", "RTX 4090", "MI300X"])
@pytest.mark.parametrize(("n", "k"), [(64, 32), (4096, 4096), (4096, 14336), (28672, 8192), (130, 100000)])
def test_plans_fit(n: int, k: int, bits: int, kind: str, memory: int, wide: tuple[Tile, ...]) -> None:
    depth = 16 // bits * 32
    size = Size(
        n, -(-k // depth), depth, 132, kind == "nested", kind == "zeros", kind == "looked_up" and bits == 4, wide
    )
    for m in (1, 2, 8, 9, 16, 17, 32, 64, 65, 128, 129, 512, 5000):
        found = candidates(size, m)
        assert found[0] == plan(size, m) and len(set(found)) == len(found)
        for one in found:
            assert plan_of(config_of(one)) == one
            if isinstance(one, Few):
                continue
            if isinstance(one, Wide):
                assert m > 64 and 1 <= one.split <= size.blocks
                assert (one.rows, one.stages) in [(tile.rows, tile.stages) for tile in wide]
                assert one.rows == 128 or m > 128
                continue
            each = -(-size.blocks // one.split)
            assert each * (one.split - 1) < size.blocks <= each * one.split
            tables = 32 << 10 if one.banks else 0
            assert one.stages * (one.block_m * depth * 2 + one.block_n * 64) + tables <= memory
            assert size.banks or not one.banks
            assert isinstance(one, Many) and one.stages >= 2 and one.block_m >= 8


def test_wide_programs_fill_the_processors() -> None:
    size = Size(8192, 64, 128, 132, wide=EVEN)
    assert plan(size, 64) == plan(Size(8192, 64, 128, 132), 64)
    # 64 tiles of 128 x 128: two parts each; from 66 tiles on, all of K at once.
    assert plan(size, 128) == Wide(2, 4) and plan(size, 256) == Wide(1, 4)
    # Too few tiles, however they are cut.
    assert isinstance(plan(Size(1024, 32, 128, 132, wide=EVEN), 128), Many)


def test_tiles_of_256_rows_where_they_need_no_more_time() -> None:
    size = Size(8192, 64, 128, 132, looked_up=True, banks=True, wide=LOOKED_UP)
    # A round of tiles of 256 rows, or two of 128.
    assert plan(size, 512) == Wide(1, 2, 256) and plan(size, 2048) == Wide(1, 2, 256)
    # Half of the processors would have a tile of 256 rows, and parts of tiles must be added up.
    assert plan(Size(4096, 32, 128, 132, looked_up=True, banks=True, wide=LOOKED_UP), 512) == Wide(1, 4, 128)
    assert plan(Size(4096, 112, 128, 132, looked_up=True, banks=True, wide=LOOKED_UP), 512) == Wide(2, 2, 256)
    # Five rounds of 128 rows, or three of 256.
    nearly = (Tile(128, 4, 0.94), Tile(256, 2, 1.0))
    assert plan(Size(8192, 64, 128, 132, zeros=True, wide=nearly), 1152).rows == 128  # type: ignore[union-attr]
    # Weights that are no work to widen gain nothing.
    for n in (4096, 8192, 14336):
        for m in (129, 300, 512, 700, 1024, 2048, 20000):
            one = plan(Size(n, 32, 128, 132, wide=EVEN), m)
            assert isinstance(one, Wide) and one.rows == 128


def test_plans_of_other_weights_fit() -> None:
    def fitted(config: dict[str, object], tiles: tuple[Tile, ...]) -> Plan:
        return within(plan_of(config), Size(4096, 32, 128, 132, wide=tiles))

    # As tables measured before there were tiles of 256 rows hold it.
    assert fitted({"kernel": "wide", "split": 2, "stages": 9}, EVEN) == Wide(2, 4, 128)
    config = {"kernel": "wide", "split": 1, "stages": 9, "rows": 256}
    assert fitted(config, EVEN) == Wide(1, 2, 256) and fitted(config, EVEN[:1]) == Wide(1, 4, 128)
    # A single stage would be waited for before it is given back.
    assert fitted({"kernel": "wide", "split": 1, "stages": 1}, EVEN) == Wide(1, 2, 128)


@pytest.mark.parametrize("n", [64, 256, 1024, 4096, 14336, 128256])
@pytest.mark.parametrize("wide", [(), EVEN, LOOKED_UP])
def test_every_way_of_cutting_is_compared(n: int, wide: tuple[Tile, ...]) -> None:
    size = Size(n, 32, 128, 132, not wide, False, wide)
    compared = [one for one in probed(size, (1, 20, 130, 700)) if not isinstance(one, int)]
    known = [plan(size, m) for m in (1, 20, 130, 700)] + [plan_of(config) for _, config in compared]
    assert len(compared) < 6 and all(m <= 300 for m, _ in compared)

    def kind(one: Plan) -> tuple[object, ...]:
        if isinstance(one, Few):
            return "few", one.block_m
        return type(one), one.rows if isinstance(one, Wide) else one.block_m, one.split > 1

    kinds = {kind(one) for one in known}
    assert {kind(plan(size, m)) for m in range(128, 40000, 128)} <= kinds


def test_tiles_by_the_memory_there_is() -> None:
    def tiles(bits: int) -> list[tuple[int, int]]:
        of = Affine(out_features=64, in_features=256, bits=bits, grid=Grid.along_k(64))
        return [(tile.rows, tile.stages) for tile in tiles_of(Tiled(out_features=64, in_features=256, of=of))]

    assert tiles(2) == [(128, 2)] and tiles(4) == [(128, 4), (256, 2)] and tiles(8) == [(128, 8), (256, 4)]


def test_rows_of_one_scale_are_scaled_late() -> None:
    size = {"out_features": 64, "in_features": 256}

    def late(of: Affine | Float8 | Lookup) -> bool:
        return scaled_late(Tiled(**size, of=of))

    rows, groups = {**size, "grid": Grid.along_k(256)}, {**size, "grid": Grid.along_k(64)}
    assert late(Affine(**rows, bits=4)) and late(Affine(**rows, bits=8, zero_point=128.0))
    assert late(Float8(**rows)) and late(Lookup(**rows))
    assert not late(Affine(**groups, bits=4)) and not late(Float8(**groups))
    # What codes are less by is rounded, or differs.
    assert not late(Affine(**rows, bits=4, zero_point=7.5)) and not late(Affine(**rows, bits=4, zero="value"))
