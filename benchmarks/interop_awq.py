"""Compares the AWQ formats with autoawq's own code: its layers packed by it, read and written back by the plugin.

    pip download --no-deps autoawq==0.2.9 && tar xzf autoawq-0.2.9.tar.gz
    python benchmarks/interop_awq.py autoawq-0.2.9 --out benchmarks/results/interop_awq.json

autoawq itself no longer imports with today's transformers; only its layer classes are loaded, which need torch alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from qhub_awq.config import spec
from qhub_awq.format import format_of
from qhub_awq.plan import layout_of

CLASSES = {"gemm": "WQLinear_GEMM", "gemv": "WQLinear_GEMV", "gemv_fast": "WQLinear_GEMVFast"}
SHAPES = [(64, 128, 64), (128, 256, 128), (256, 512, 32), (192, 1024, 128), (64, 1152, 64), (512, 256, 64)]


def layers(source: Path) -> dict[str, Any]:
    """Return autoawq's layer classes by format, without running its packages' own ``__init__``."""
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules[name] = package
    helper = types.ModuleType("awq.utils.utils")
    helper.get_best_device = lambda: "cpu"  # type: ignore[attr-defined]
    sys.modules["awq.utils.utils"] = helper
    return {name: getattr(importlib.import_module(f"awq.modules.linear.{name}"), cls) for name, cls in CLASSES.items()}


def compare(name: str, cls: Any, size: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """Return whether one layer that autoawq packed reads as its codes say, and is written back with the same bytes."""
    n, k, group = size
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    zeros = torch.randint(0, 16, (n, k // group), generator=generator)
    scales = (0.005 + 0.01 * torch.rand(n, k // group, generator=generator)).half()
    spread = scales.float().repeat_interleave(group, 1)
    weight = (codes - zeros.repeat_interleave(group, 1)) * spread
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weight
    # Its gemm layer takes scales and zeros transposed.
    turn = (lambda t: t.t().contiguous()) if name == "gemm" else (lambda t: t)
    packed = cls.from_linear(linear, 4, group, scales=turn(scales.float()), zeros=turn(zeros.float()))
    entries = {entry: tensor.contiguous() for entry, tensor in packed.state_dict().items()}
    config = spec().parse({"quant_method": "awq", "bits": 4, "group_size": group, "format": name, "zero_point": True})
    fmt, planned = format_of(config), layout_of(config, n, k)
    layout, parts = fmt.unpack(planned, entries)
    again = fmt.pack(layout, parts, torch.float16)
    # gemv_fast keeps scale * zero rounded to float16.
    exact = weight
    if name == "gemv_fast":
        exact = codes * spread - (scales.float() * zeros).half().float().repeat_interleave(group, 1)
    return {
        "format": name,
        "size": list(size),
        "codes": bool(torch.equal(layout.codes(parts).to(codes.dtype), codes)),
        "largest difference": float((layout.dequantize(parts) - exact).abs().max()),
        "bytes": all(torch.equal(again[entry], tensor) for entry, tensor in entries.items()),
    }


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of autoawq's unpacked source")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found = layers(given.source)
    rows = [compare(name, found[name], size, seed) for name in CLASSES for seed, size in enumerate(SHAPES)]
    for row in rows:
        print(row)
    result = {"autoawq": given.source.name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    if not all(row["codes"] and row["bytes"] and row["largest difference"] < 1e-6 for row in rows):
        raise SystemExit("a layer differs: see above")


if __name__ == "__main__":
    main()
