"""Times quantizing a Llama-3-8B-shaped model (random weights) with a method that calibrates, on one GPU.

128 samples of 2048 random tokens; the model is made on the GPU and quantized in place. Phases are timed with the device
synchronized at their ends. Written with hardware and versions; runs of the same model with the same versions are added
to what is there::

    python benchmarks/calibration_gpu.py --out benchmarks/results/calibration_gpu.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qhub
from qhub.registry import registry

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "GPTQ 4-bit g128": {"quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.05},
    "GPTQ 4-bit g128 ranges": {"quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.05, "mse": 0.0},
    "GPTQ 4-bit g128 high": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "damp_percent": 0.05,
        "sym": False,
        "meta": {"quality": "high"},
    },
    "AWQ 4-bit g128": {"quant_method": "awq", "bits": 4, "group_size": 128},
}


def llama(layers: int) -> Any:
    """Return a model of Llama 3 8B's shape with ``layers`` layers, in bfloat16 on the GPU."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    with torch.device("cuda"):
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--only", choices=list(CONFIGURATIONS), action="append")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    data = list(torch.randint(0, 128000, (arguments.samples, 1, 2048), generator=generator))
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("qhub-core", "torch", "transformers")},
        "model": f"Llama 3 8B shape, {arguments.layers} layers, bfloat16, random weights",
        "samples": f"{arguments.samples} x 2048 tokens",
        "runs": {},
    }
    if arguments.out.exists():
        known = json.loads(arguments.out.read_text())
        if all(known[name] == results[name] for name in ("gpu", "versions", "model", "samples")):
            results["runs"] = known["runs"]
    for name in arguments.only or CONFIGURATIONS:
        values = CONFIGURATIONS[name]
        if values["quant_method"] not in registry.list():
            continue
        config = registry.call(values["quant_method"], "qhub_config").parse(dict(values))
        model = llama(arguments.layers)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        qhub.quantize(model, config, data=data, length=2048, progress=lambda done, total, text: None)
        torch.cuda.synchronize()
        report = model.hf_quantizer.calibration
        results["runs"][name] = {
            "seconds": time.perf_counter() - start,
            "phases": report.seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "mean_error": sum(layer.error or 0.0 for layer in report.layers) / len(report.layers),
        }
        print(name, json.dumps(results["runs"][name]), flush=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
