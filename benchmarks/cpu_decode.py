"""Measures decoding on a CPU: tokens a second of a quantized model beside bf16, on qhub-cpu and on the reference.

Greedy ``generate`` of 64 tokens, batch 1. In each round every configuration runs once, in random order; a ratio is
taken within a round, so that whatever else the machine does meets both sides. bf16 runs twice a round: the second is
the null control, whose ratio shows how far two equal things differ here. The result is committed with versions::

    python benchmarks/cpu_decode.py MODEL --out benchmarks/results/cpu_decode.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HqqConfig

from qhub.kernels import explain

PROMPT = "The scheduler picks the next task to run by comparing"
NEW_TOKENS = 64

_NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@dataclass(frozen=True)
class Configuration:
    """Is one thing to measure: a quantization config, None for bf16, and the kernel to force, None for the best."""

    quantization: Any = None
    kernel: str | None = None


def configurations() -> dict[str, Configuration]:
    """Return what is measured, by name."""
    nested = BitsAndBytesConfig(**_NF4)
    return {
        "bf16": Configuration(),
        "bf16 again": Configuration(),
        "NF4 nested, reference": Configuration(nested, "reference"),
        "NF4 nested": Configuration(nested),
        "NF4 nested, bf16 compute": Configuration(BitsAndBytesConfig(**_NF4, bnb_4bit_compute_dtype=torch.bfloat16)),
        "HQQ 4-bit g64": Configuration(HqqConfig(nbits=4, group_size=64)),
        "HQQ 2-bit g64": Configuration(HqqConfig(nbits=2, group_size=64)),
        "HQQ 8-bit g64": Configuration(HqqConfig(nbits=8, group_size=64)),
        "LLM.int8()": Configuration(BitsAndBytesConfig(load_in_8bit=True)),
    }


def seconds_of(model: Any, tokens: torch.Tensor, kernel: str | None) -> float:
    """Return how long one ``generate`` takes with ``kernel`` forced."""
    if kernel is not None:
        os.environ["QHUB_KERNEL"] = kernel
    try:
        with torch.inference_mode():
            started = time.perf_counter()
            model.generate(
                tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )
            return time.perf_counter() - started
    finally:
        if kernel is not None:
            del os.environ["QHUB_KERNEL"]


def kernels_of(model: Any, kernel: str | None) -> list[str]:
    """Return the kernels that products with one row take, forced or chosen."""
    if kernel is not None:
        return [kernel]
    return sorted({next(iter(layer.kernels.values())) for layer in explain(model).layers})


def measure(folder: str, rounds: int, seed: int) -> dict[str, Any]:
    """Return tokens a second and ratios to bf16 of every configuration."""
    wanted = configurations()
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    models: dict[int, Any] = {}
    for one in wanted.values():
        if id(one.quantization) not in models:
            models[id(one.quantization)] = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, quantization_config=one.quantization
            )
    runs = {name: (models[id(one.quantization)], tokens, one.kernel) for name, one in wanted.items()}
    first = {name: seconds_of(*run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(seed)
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(seconds_of(*runs[name]))
    result = {}
    for name, (model, _, kernel) in runs.items():
        ratios = sorted(base / own for base, own in zip(times["bf16"], times[name], strict=True))
        result[name] = {
            "tokens_per_second": round(NEW_TOKENS / statistics.median(times[name]), 2),
            "best_tokens_per_second": round(NEW_TOKENS / min(times[name]), 2),
            "speed_over_bf16": round(statistics.median(ratios), 3),
            "speed_over_bf16_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
            "first_run_seconds": round(first[name], 2),
            "kernels": kernels_of(model, kernel),
        }
    return result


def machine() -> dict[str, Any]:
    """Return what torch and the platform say of this computer."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    before = machine()
    found = measure(arguments.model, arguments.rounds, arguments.seed)
    for name, row in found.items():
        speeds = f"{row['tokens_per_second']:8.2f} tokens/s  {row['speed_over_bf16']:6.3f} x bf16"
        print(f"{name:28s} {speeds}  {', '.join(row['kernels'])}")
    known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {"models": {}}
    known["models"].setdefault(Path(arguments.model).name, {})[f"{before['threads']} threads"] = {
        "date": datetime.date.today().isoformat(),
        "machine": before,
        "versions": {p: version(p) for p in ("qhub-core", "qhub-cpu", "torch", "transformers", "numba")},
        "new_tokens": NEW_TOKENS,
        "rounds": arguments.rounds,
        "configurations": found,
    }
    arguments.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
