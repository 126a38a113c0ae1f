"""Plans of the kernels for tiles: every part has work, every stage has its memory."""

from __future__ import annotations

import pytest
from qhub_triton.tiled.plans import Few, Many, Size, Wide, candidates, config_of, plan, plan_of


@pytest.mark.parametrize("stages", [0, 4])
@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(64, 32), (4096, 4096), (4096, 14336), (28672, 8192), (130, 100000)])
def test_plans_fit(n: int, k: int, bits: int, light: bool, stages: int) -> None:
    depth = 16 // bits * 32
    size = Size(n, -(-k // depth), depth, 132, light, False, stages)
    for m in (1, 2, 8, 9, 16, 17, 32, 64, 65, 128, 129, 512, 5000):
        found = candidates(size, m)
        assert found[0] == plan(size, m) and len(set(found)) == len(found)
        for one in found:
            assert plan_of(config_of(one)) == one
            if isinstance(one, Few):
                continue
            if isinstance(one, Wide):
                assert stages and m > 64 and 1 <= one.split <= size.blocks and one.stages == stages
                continue
            each = -(-size.blocks // one.split)
            assert each * (one.split - 1) < size.blocks <= each * one.split
            # An H100 gives a program 227 KiB.
            assert one.stages * (one.block_m * depth * 2 + one.block_n * 64) <= 227 << 10
            assert isinstance(one, Many) and one.stages >= 2 and one.block_m >= 8


def test_wide_programs_fill_the_processors() -> None:
    size = Size(8192, 64, 128, 132, True, False, 4)
    assert plan(size, 64) == plan(Size(8192, 64, 128, 132, True), 64)
    # 64 tiles of 128 x 128: two parts each; from 66 tiles on, all of K at once.
    assert plan(size, 128) == Wide(2, 4) and plan(size, 256) == Wide(1, 4)
    # Too few tiles, however they are cut.
    assert isinstance(plan(Size(1024, 32, 128, 132, True, False, 4), 128), Many)
