"""Times the experts of models on one GPU: qhub's grouped kernels against transformers' own implementations in bf16.

    python -m benchmarks.gpu.experts --out FILE [--models mixtral,qwen3,gpt-oss] [--tokens 1,8,64,512] [--seconds 60]

A module as transformers' ``use_experts_implementation`` prepares it, weights random, top-k experts drawn anew for each
of 16 calls in a CUDA graph. Times are of the whole forward: routing, both products, activation, weighted sum. bf16 is
the faster of ``grouped_mm`` and ``batched_mm``. Before it is timed, a quantized module is compared with the bf16
implementation on its own dequantized weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.machine import describe
from benchmarks.gpu.timing import capture, replay_times
from qhub.layouts import Affine, Float8, Grid, Layout, Lookup
from qhub.layouts.tiled import Tiled
from qhub.tensor import QuantizedTensor

_CALLS = 16


@dataclass(frozen=True)
class Model:
    """Is the experts of a layer: ``experts`` of (inner, hidden), of which ``top`` are taken for a token."""

    experts: int
    hidden: int
    inner: int
    top: int


MODELS = {
    "mixtral": Model(8, 4096, 14336, 2),
    "qwen3": Model(128, 2048, 768, 8),
    "gpt-oss": Model(32, 2880, 2880, 4),
}
LAYOUTS: dict[str, Callable[[int, int], Layout]] = {
    "int4": lambda n, k: Affine(
        out_features=n, in_features=k, bits=4, grid=Grid.along_k(128 if k % 128 == 0 else 64), zero_point=8.0
    ),
    "mxfp4": lambda n, k: Lookup(out_features=n, in_features=k, bits=4, grid=Grid.along_k(32)),
    "fp8": lambda n, k: Float8(out_features=n, in_features=k, grid=Grid("block", 1, k)),
}
DENSE = ("grouped_mm", "batched_mm")


class Experts(nn.Module):
    """Has what transformers' ``use_experts_implementation`` gives a module; ``weights``: (E, 2 inner, hidden), then
    (E, hidden, inner)."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, False
    _is_expert_parallel = False

    def __init__(self, model: Model, weights: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.num_experts = model.experts
        self.gate_up_proj = nn.Parameter(weights[0], requires_grad=False)
        self.down_proj = nn.Parameter(weights[1], requires_grad=False)

    def act_fn(self, x: Tensor) -> Tensor:
        """Return SiLU of x."""
        return nn.functional.silu(x)

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def shapes_of(model: Model) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (N, K) of both products."""
    return (2 * model.inner, model.hidden), (model.hidden, model.inner)


def filled(layout: Layout, experts: int, seed: int) -> dict[str, Tensor]:
    """Return random parts of a layout, with one leading dimension."""
    generator = torch.Generator("cuda").manual_seed(seed)
    parts = {}
    for name, spec in layout.core_specs().items():
        shape = (experts, *spec.shape) if spec.batched else spec.shape
        if name == "table":
            parts[name] = torch.linspace(-1, 1, shape[0], device="cuda")
        elif name == "scales" and layout.kind == "lookup":
            codes = torch.randint(118, 122, shape, generator=generator, device="cuda")
            parts[name] = codes.to(torch.uint8).view(torch.float8_e8m0fnu)
        elif name == "scales":
            scales = (torch.rand(shape, generator=generator, device="cuda") + 0.5) * 0.01
            parts[name] = scales.to(torch.float32 if layout.kind == "float8" else torch.bfloat16)
        elif spec.dtypes[0].is_floating_point:
            parts[name] = torch.randn(shape, generator=generator, device="cuda").to(spec.dtypes[0])
        else:
            parts[name] = torch.randint(0, 256, shape, generator=generator, device="cuda").to(spec.dtypes[0])
    return parts


def modules_of(model: Model, kind: str) -> tuple[Experts, Experts]:
    """Return the quantized experts, and bf16 ones with their dequantized weights."""
    held, dense = [], []
    for seed, (n, k) in enumerate(shapes_of(model)):
        layout = LAYOUTS[kind](n, k)
        parts = filled(layout, model.experts, seed)
        dense.append(layout.dequantize(parts, torch.bfloat16))
        held.append(QuantizedTensor.build(*Tiled.arrange(layout, parts), torch.bfloat16))
    return Experts(model, (held[0], held[1])), Experts(model, (dense[0], dense[1]))


def forwards() -> dict[str, Callable[..., Tensor]]:
    """Return the implementations by name."""
    from qhub_triton.grouped.experts import experts_forward
    from transformers.integrations import moe

    return {"qhub": experts_forward, **{name: getattr(moe, f"{name}_experts_forward") for name in DENSE}}


def _forward(
    function: Callable[..., Tensor], module: Experts, x: Tensor, ids: list[Tensor], weights: Tensor, i: int
) -> Tensor:
    return function(module, x, ids[i % _CALLS], weights)


def measure(model: Model, kind: str, tokens: list[int], run: dict[str, Any], name: str) -> None:
    """Check and time one model's experts on one layout; cells go into the run."""
    own, dense = modules_of(model, kind)
    known = forwards()
    for count in tokens:
        generator = torch.Generator("cuda").manual_seed(count)
        x = torch.randn(count, model.hidden, generator=generator, device="cuda", dtype=torch.bfloat16)
        ids = [
            torch.rand(count, model.experts, generator=generator, device="cuda").topk(model.top).indices
            for _ in range(_CALLS)
        ]
        weights = torch.rand(count, model.top, generator=generator, device="cuda").to(torch.bfloat16)
        # What takes a copy of each row's weights is left out where there are many.
        calls: dict[str, Callable[[int], Tensor]] = {
            which: partial(_forward, function, own if which == "qhub" else dense, x, ids, weights)
            for which, function in known.items()
            if which != "batched_mm" or count * model.top <= 32
        }
        with torch.no_grad():
            wanted = calls["grouped_mm"](0).float()
            error = float((calls["qhub"](0).float() - wanted).norm() / wanted.norm())
        cell: dict[str, Any] = {"model": name, "layout": kind, "tokens": count, "difference": error, "us": {}}
        run["cells"].append(cell)
        if not error < 0.02:
            cell["wrong"] = True
            continue
        replays = {}
        for which, call in calls.items():
            try:
                replays[which] = capture(call, _CALLS)
            except Exception as problem:
                cell.setdefault("failed", {})[which] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        times = replay_times(replays, 5)
        cell["us"] = {which: round(statistics.median(found), 2) for which, found in times.items()}
        print(json.dumps(cell), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further model after so long")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    run: dict[str, Any] = {
        "id": uuid.uuid4().hex[:12], "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe(),
        "cells": [],
    }  # fmt: skip
    tokens = [int(one) for one in arguments.tokens.split(",")]
    for kind in arguments.layouts.split(","):
        for name in arguments.models.split(","):
            if time.perf_counter() - begun > arguments.seconds:
                print("out of time before", name, kind, flush=True)
                continue
            measure(MODELS[name], kind, tokens, run, name)
            gc.collect()
            torch.cuda.empty_cache()
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({"runs": [run]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
