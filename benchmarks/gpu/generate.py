"""Measures plain ``model.generate`` on a GPU, end to end: eager and optimized, dense and quantized, batch by batch.

    python benchmarks/gpu_generate.py --out results.json
    python benchmarks/gpu_generate.py --only int4 --batches 1 8 32 --prompts 32 2048 --profile

The model has the shape of Llama-3-8B and random weights; the 4-bit one random codes and one scale for 128 weights of a
row. Tokens/s are those of whole calls (prompt included), the median of three after a warm-up; ``setup_s`` is what the
first call took longer than the others.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import qhub
from qhub.layouts import Affine
from qhub.layouts.grid import Grid
from qhub.layouts.tiled import Tiled
from qhub.modules import QuantLinear
from qhub.tensor import QuantizedTensor

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


def to_int4(model: Any, group: int = 128) -> None:
    """Replace every linear layer but the head by a 4-bit one with random codes."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or name == "lm_head":
                continue
            n, k = child.out_features, child.in_features
            device, dtype = child.weight.device, child.weight.dtype
            layer = QuantLinear.hollow(k, n, None, dtype)
            layout = Affine(out_features=n, in_features=k, bits=4, grid=Grid.along_k(group), zero_point=8.0)
            parts = {
                "qweight": torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device),
                # Codes are spread evenly over 16 steps: their standard deviation is 4.6.
                "scales": (0.5 + torch.rand(n, k // group, device=device)).to(dtype) * 0.02 / 4.6,
            }
            tiled, ordered = Tiled.arrange(layout, parts)
            layer._parameters["weight"] = QuantizedTensor.build(tiled, ordered, dtype)  # type: ignore[assignment]
            setattr(parent, name, layer)


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
    parser.add_argument("--only", nargs="+", choices=["bf16-eager", "bf16", "int4-eager", "int4"])
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
    }
    start = time.perf_counter()
    model = build(options.shape, "cuda")
    print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
    for variant in ("bf16-eager", "bf16", "int4-eager", "int4"):
        if variant not in wanted:
            continue
        if variant.startswith("int4") and not any(isinstance(p, QuantizedTensor) for p in model.parameters()):
            qhub.optimize(model, False)
            to_int4(model)
            torch.cuda.empty_cache()
        if not variant.endswith("eager"):
            del os.environ["QHUB_OPTIMIZE"]
            from qhub.decoding.optimizing import _decoders

            _decoders.pop(model, None)
            qhub.optimize(model)
        for prompt in options.prompts:
            for batch in options.batches:
                row = {"variant": variant, **measure(model, batch, prompt, options.new, options.repeats)}
                report["runs"].append(row)
                print(json.dumps(row), flush=True)
        if not variant.endswith("eager"):
            decoder = _decoders[model]
            found = [(key, step.found) for key, step in decoder.steps.items()]
            print("steps", found, "joined", len(decoder.joined), "told", decoder.told, flush=True)
            if options.profile:
                report["profiles"][variant] = rows = profile(model)
                for row in rows[:25]:
                    counted = f"{row.get('count', 0):6d} x {row.get('median_us', 0):8.2f}"
                    print(f"  {row['total_us']:10.0f} us {counted}  {row['name'][:90]}")
            os.environ["QHUB_OPTIMIZE"] = "0"
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
