"""Measures plain ``model.generate`` on a GPU, end to end: eager and optimized, dense and quantized, batch by batch.

    python -m benchmarks.gpu.generate --out results.json
    python -m benchmarks.gpu.generate --only int4 --batches 1 8 32 --prompts 32 2048 --profile

The model has the shape of Llama-3-8B and random weights, the quantized ones those of the grid's contestants of the same
name, but for the head, which stays as it is. Tokens/s are those of whole calls (prompt included), the median of three
after a warm-up; ``setup_s`` is what the first call took longer than the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import qhub
from benchmarks.gpu.case import Case
from benchmarks.gpu.qhub_contestants import MAKERS, Made, weight_of
from qhub.modules import QuantLinear

SHAPES = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}
DENSE = ("bf16-eager", "bf16")
VARIANTS = (*DENSE, "int4-eager", *MAKERS)


def build(shape: str, device: str) -> Any:
    """Return a dense bfloat16 model with random weights."""
    config = transformers.LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def quantize(model: Any, make: Callable[[Case], Made]) -> None:
    """Replace every linear layer but the head by one whose weight ``make`` returns for its shape."""
    linears = [(name, child) for name, child in model.named_modules() if isinstance(child, nn.Linear)]
    for seed, (name, child) in enumerate(linears):
        if name == "lm_head":
            continue
        n, k = child.out_features, child.in_features
        layer = QuantLinear.hollow(k, n, None, child.weight.dtype)
        layout, parts = make(Case(n, k, str(child.weight.device), seed))
        weight = weight_of(layout, parts, child.weight.dtype)
        layer._parameters["weight"] = weight  # type: ignore[assignment]
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)


def measure(model: Any, batch: int, prompt: int, new: int, repeats: int = 3) -> dict[str, Any]:
    """Return the figures of one kind of call."""
    generator = torch.Generator().manual_seed(batch * 100003 + prompt)
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)

    def call(count: int) -> tuple[float, int]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start, out.shape[1] - prompt

    torch.cuda.reset_peak_memory_stats()
    first, _ = call(new)
    runs = [call(new) for _ in range(repeats)]
    whole = statistics.median(seconds for seconds, _ in runs)
    made = runs[0][1]
    prefill = statistics.median(call(1)[0] for _ in range(repeats))
    return {
        "batch": batch,
        "prompt": prompt,
        "new": made,
        "seconds": whole,
        "tokens_per_s": batch * made / whole,
        "ms_per_step": 1e3 * (whole - prefill) / max(made - 1, 1),
        "prefill_ms": 1e3 * prefill,
        "setup_s": first - whole,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def profile(model: Any, prompt: int = 32, new: int = 24) -> list[dict[str, Any]]:
    """Return device time by kernel name over the steps of one call."""
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=model.device)
    model.generate(ids, max_new_tokens=new, do_sample=False)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        model.generate(ids, max_new_tokens=new, do_sample=False)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    spans = []
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and "Memset" not in event.name:
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us())
            spans.append((event.time_range.start, event.time_range.end))
    busy = sum(sum(times) for times in kernels.values())
    span = max(end for _, end in spans) - min(start for start, _ in spans)
    rows = [
        {"name": name, "count": len(times), "total_us": sum(times), "median_us": statistics.median(times)}
        for name, times in kernels.items()
    ]
    rows.sort(key=lambda row: -row["total_us"])
    return [{"name": "(busy)", "total_us": busy, "count": len(spans)}, {"name": "(span)", "total_us": span}, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--only", nargs="+", choices=VARIANTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--prompts", nargs="+", type=int, default=[32])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print device time by kernel for the optimized ones")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    wanted = options.only or ["bf16-eager", "bf16", "int4"]
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("qhub").setLevel(logging.INFO)
    os.environ["QHUB_OPTIMIZE"] = "0"
    device = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "device": device.name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "shape": options.shape,
        "runs": [],
        "profiles": {},
        "failed": {},
    }
    model: Any = None
    held = ""
    for variant in (name for name in VARIANTS if name in wanted):
        layout = "bf16" if variant in DENSE else variant.removesuffix("-eager")
        if held != layout:
            model = None
            gc.collect()
            torch.cuda.empty_cache()
            model, held = build(options.shape, "cuda"), layout
            if layout != "bf16":
                quantize(model, MAKERS[layout])
                torch.cuda.empty_cache()
        try:
            run(model, variant, options, report)
        except Exception as error:
            report["failed"][variant] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(variant, "FAILED", report["failed"][variant], flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


def run(model: Any, variant: str, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Measure one variant for all batches and prompts, and add the rows to ``report``."""
    from qhub.decoding.optimizing import _decoders

    eager = variant.endswith("eager")
    os.environ["QHUB_OPTIMIZE"] = "0"
    if not eager:
        del os.environ["QHUB_OPTIMIZE"]
        _decoders.pop(model, None)
        qhub.optimize(model)
    for prompt in options.prompts:
        for batch in options.batches:
            row = {"variant": variant, **measure(model, batch, prompt, options.new, options.repeats)}
            if not eager:
                row["fused"] = {key[0]: step.found for key, step in _decoders[model].steps.items()}.get(batch)
            report["runs"].append(row)
            print(json.dumps(row), flush=True)
    if eager:
        return
    decoder = _decoders[model]
    print("joined", len(decoder.joined), "told", decoder.told, flush=True)
    if options.profile:
        report["profiles"][variant] = rows = profile(model)
        for line in rows[:25]:
            counted = f"{line.get('count', 0):6d} x {line.get('median_us', 0):8.2f}"
            print(f"  {line['total_us']:10.0f} us {counted}  {line['name'][:90]}")


if __name__ == "__main__":
    main()
