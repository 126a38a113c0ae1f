"""The kernel for many rows on Hopper, without one: it compiles for every kind of weight, and no product waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qhub.kernels import Problem
from qhub.layouts import Affine, Float8, Grid, Layout, Lookup, Nested
from qhub.layouts.tiled import Tiled

pytest.importorskip("qhub_triton.wide.kernel")
triton = pytest.importorskip("triton")

BASE: dict[str, Any] = {
    "BITS": 4, "KIND": 0, "GROUP": 128, "ZERO": 0, "ZERO_POINT": 8.0, "UNIT": 1.0, "WHOLE": False, "ROUNDS": False,
    "LATE": False, "HAS_BIAS": False, "SPLIT": 1, "TILE_N": 128,
}  # fmt: skip
TABLE: dict[str, Any] = {"KIND": 1, "ZERO_POINT": 0.0, "GROUP": 64, "ROUNDS": True}
FLOAT8: dict[str, Any] = {"BITS": 8, "KIND": 2, "ZERO_POINT": 0.0, "ROUNDS": True}
KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "int4": ("bf16", "bf16", "u8", {}),
    "parts": ("bf16", "bf16", "u8", {"SPLIT": 2, "HAS_BIAS": True}),
    "zeros": ("bf16", "bf16", "u8", {"ZERO": 1, "ZERO_POINT": 0.0, "WHOLE": True}),
    "fractional": ("bf16", "fp32", "bf16", {"ZERO": 1, "ZERO_POINT": 0.0, "GROUP": 64, "ROUNDS": True}),
    "table": ("bf16", "fp32", "u8", TABLE),
    "table, 32": ("bf16", "fp32", "u8", {**TABLE, "GROUP": 32}),
    "table, half": ("fp16", "fp32", "u8", TABLE),
    "int8": ("bf16", "bf16", "u8", {"BITS": 8, "ZERO_POINT": 128.0}),
    "int8, late": ("bf16", "fp32", "u8", {"BITS": 8, "ZERO_POINT": 128.0, "LATE": True, "GROUP": 4096, "SPLIT": 2}),
    "int2": ("bf16", "bf16", "u8", {"BITS": 2, "ZERO_POINT": 2.0}),
    "half": ("fp16", "fp16", "u8", {}),
    "float8": ("bf16", "fp32", "u8", FLOAT8),
    "float8, late": ("bf16", "fp32", "u8", {**FLOAT8, "LATE": True, "GROUP": 4096}),
}
CASES = [f"{kind}, {rows}" for kind in KINDS for rows in (128, 256) if (kind, rows) != ("int2", 256)]


def _constants(case: str) -> dict[str, Any]:
    from qhub_triton.wide.tiles import span_of, tiles_of

    kind, _, rows = case.rpartition(", ")
    own = {**BASE, **KINDS[kind][3]}
    layout = Affine(out_features=64, in_features=256, bits=own["BITS"], grid=Grid.along_k(64))
    stages = {tile.rows: tile.stages for tile in tiles_of(Tiled(out_features=64, in_features=256, of=layout))}
    return {**own, "TILE_M": int(rows), "SPAN": span_of(int(rows), 16 // own["BITS"]), "STAGES": stages[int(rows)]}


def _compile(case: str) -> Any:
    from qhub_triton.wide import kernel
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    dtype, scales, zeros, _ = KINDS[case.rpartition(", ")[0]]
    constants = _constants(case)
    rows = constants["TILE_M"]

    def piece(kind: str, rows: int, columns: int, swizzle: int) -> str:
        shared = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=2)
        return f"tensordesc<{kind}[{rows}, {columns}],{shared!r}>"

    types = {
        "xd": piece(dtype, rows, constants["SPAN"], 128), "wd": piece("i16", 64, 32, 64), "scales": f"*{scales}",
        "zeros": f"*{zeros}", "table": "*i32", "bias": f"*{dtype}", "yd": piece(dtype, rows, 64, 128),
        "shares": "*fp32", "counters": "*i32",
    }  # fmt: skip
    names = kernel.wide.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    source = GluonASTSource(
        kernel.wide,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in ("scales", "zeros", "shares", "bias")},
    )
    options = {"num_warps": kernel.WARPS, **({"maxnreg": kernel.REGISTERS} if rows == 256 else {})}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def _assembler() -> Path:
    """Return the assembler that triton takes for Hopper; it comes with it, for Linux."""
    from triton.backends.nvidia.compiler import get_ptxas

    return Path(get_ptxas(90).path)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile every case in a process without the interpreter, which stands in for the compiler in this one."""
    folder = tmp_path_factory.mktemp("wide")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="triton comes with an assembler for Linux")
@pytest.mark.parametrize("case", CASES)
def test_products_are_left_under_way(case: str, compiled: Path) -> None:
    # A program may have 227 KiB of an H100's shared memory.
    assert json.loads((compiled / f"{case}.json").read_text())["shared"] <= 227 << 10
    code = compiled / f"{case}.ptx"
    command = [_assembler(), "-v", "--gpu-name=sm_90a", code, "-o", compiled / f"{case}.cubin"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # C7510 to C7514: products are made to wait for each other.
    assert "C75" not in told and "bytes spill stores" not in told.replace(" 0 bytes spill stores", ""), told
    waits = [line.split()[-1].rstrip(";") for line in code.read_text().splitlines() if "wgmma.wait_group" in line]
    # Each of two roles waits for all products once, at a tile's end, and leaves one under way after each in its loop.
    assert waits.count("0") == 2 and waits.count("1") == 2 * 16 // _constants(case)["BITS"]


@pytest.mark.parametrize("rows", [128, 256])
def test_values_a_kernel_is_compiled_for(rows: int) -> None:
    from qhub_triton.tiled.linear import Product
    from qhub_triton.tiled.plans import Wide
    from qhub_triton.wide import kernel
    from qhub_triton.wide.launching import WideLaunch
    from qhub_triton.wide.tiles import tiles_of

    def launch(layout: Layout, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
        parts = {"scales": torch.ones(layout.scale_shape)}  # type: ignore[attr-defined]
        if isinstance(layout, Float8):
            parts["qweight"] = torch.zeros(264, 1152).to(torch.float8_e4m3fn)
        else:
            assert isinstance(layout, Affine)
            parts["qweight"] = layout.pack_codes(torch.zeros(264, 1152, dtype=torch.uint8))
            if layout.zero == "value":
                parts["zeros"] = torch.zeros(layout.scale_shape, dtype=torch.uint8)
        tiled, own = Tiled.arrange(layout, parts)
        product = Product(tiled, own, dtype, Wide(2, 9, rows), tiles_of(tiled))
        chosen, run = product._launch(700, biased=True, aligned=True, overlap=False)
        assert isinstance(run, WideLaunch) and isinstance(chosen, Wide) and chosen.rows == rows
        # Another number of rows needs no other launch; a last tile that is not full is one too.
        assert product._launch(1000, biased=True, aligned=True, overlap=False)[1] is run
        assert run.tiles(700) == 3 * (6 if rows == 128 else 3)
        constants = run.launch.constants
        assert set(constants) <= set(kernel.wide.arg_names) and constants["TILE_M"] == rows
        assert (
            run.x.block_shape == [rows, constants["SPAN"]]
            and run.launch.options.get("maxnreg", 0) == (rows == 256) * 248
        )
        return constants

    size = {"out_features": 264, "in_features": 1152}
    groups, row = {**size, "grid": Grid.along_k(128)}, {**size, "grid": Grid.along_k(1152)}
    # What is made of subnormal numbers is times 2^-69; a row's only scale is multiplied by its sum.
    for layout, unit, late in (
        (Affine(**groups, bits=4, zero_point=8.0), 2.0**69, False),
        (Affine(**row, bits=8, zero_point=128.0), 2.0**69, True),
        (Affine(**groups, bits=4, zero_point=0.0, zero="value"), 2.0**69, False),
        (Float8(**groups), 2.0**69, False),
        (Float8(**row), 1.0, True),
    ):
        found = launch(layout)
        assert (found["UNIT"], found["LATE"]) == (unit, late)
        assert launch(layout, torch.float16)["UNIT"] == 1.0


def test_what_it_leaves_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from qhub_triton.wide.offers import offers

    (spec,) = offers()
    size = {"out_features": 64, "in_features": 256, "grid": Grid.along_k(64)}

    def refusal(layout: Layout) -> str | None:
        return spec.refusal(Problem(Tiled(out_features=64, in_features=256, of=layout), "cuda", torch.bfloat16))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(Lookup(**size)) == "is for NVIDIA's compute capability 9"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, there in (((8, 0), False), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert (refusal(Lookup(**size)) is None) == there
        assert "takes [2, 4, 8] bits" in str(refusal(Affine(**size, bits=3)))
    assert "codes of 4 bits" in str(refusal(Lookup(**size, bits=8)))
    nested = Lookup(**size, scales_nested=Nested(group=16, table=True, offset=True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert "second level" in str(refusal(nested))


if __name__ == "__main__":
    for name in CASES:
        found = _compile(name)
        (Path(sys.argv[1]) / f"{name}.ptx").write_text(found.asm["ptx"])
        (Path(sys.argv[1]) / f"{name}.json").write_text(json.dumps({"shared": found.metadata.shared}))
