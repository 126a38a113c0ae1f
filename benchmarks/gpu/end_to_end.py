"""Times a Llama-3-8B-shaped model (random weights) on one GPU: quantizing it, reading 2048 tokens, one LoRA step.

    python -m benchmarks.gpu.end_to_end --out FILE [--variants bf16,nf4,...] [--layers 32]

Quantizing: the 224 linears that lie on the GPU already, lm_head left out. Prefill: 2048 tokens into an empty cache, the
last token's logits. LoRA: rank 16 on all linears, 4 x 512 tokens, forward, backward and AdamW step under bfloat16
autocast, without checkpointing. Wall time with the device synchronized at both ends, medians. bitsandbytes is used
without qhub: ``nn.Linear`` replaced by its ``Linear4bit``, PEFT's own layers on it. Runs are added to what is in FILE.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import describe

QHUB: dict[str, dict[str, Any]] = {
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        # The config's default is float32.
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "nf4_nested": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
    },
    "llm_int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "rtn": {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}, "ignore": ["lm_head"]},
    "hqq": {"quant_method": "hqq", "nbits": 4, "group_size": 64, "axis": 1},
    "fp8": {"quant_method": "compressed-tensors", "config_groups": {"FP8_DYNAMIC": ["Linear"]}, "ignore": ["lm_head"]},
}
VARIANTS = ("bf16", *(f"qhub_{name}" for name in QHUB), "bnb_nf4")
_RANK = 16


def llama(layers: int) -> Any:
    """Return a model of Llama 3 8B's shape in bfloat16 on the GPU, weights random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def with_qhub(model: Any, values: dict[str, Any]) -> Any:
    """Quantize ``model`` in place with one of qhub's methods; put its weights into the order that kernels read."""
    import qhub
    from qhub.registry import registry

    config = registry.call(values["quant_method"], "qhub_config").parse(dict(values))
    return qhub.optimize(qhub.quantize(model, config, progress=lambda done, total, text: None))


def with_bitsandbytes(model: Any) -> Any:
    """Replace the linears of ``model`` by bitsandbytes' NF4 layers, which quantize on the way to the GPU."""
    import bitsandbytes as bnb
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        layer = Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
            compress_statistics=False, device="meta",
        )  # fmt: skip
        packed, state = bnb.functional.quantize_4bit(
            module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=False
        )
        layer.weight = Params4bit(
            packed, requires_grad=False, quant_state=state, quant_type="nf4", blocksize=64, compress_statistics=False,
            bnb_quantized=True, module=layer,
        )  # fmt: skip
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.is_loaded_in_4bit = True
    return model


def seconds(run: Callable[[], Any], count: int = 1, warmup: int = 0) -> float:
    """Return the median wall time of ``run`` in seconds, the device synchronized around it."""
    return statistics.median(times_of(run, count, warmup))


def times_of(run: Callable[[], Any], count: int, warmup: int) -> list[float]:
    """Return the wall times of ``count`` calls of ``run`` in seconds, after ``warmup`` others."""
    times = []
    for index in range(warmup + count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if index >= warmup:
            times.append(time.perf_counter() - start)
    return times


def prefill(model: Any) -> Callable[[], Any]:
    """Return what reads 2048 tokens into an empty cache."""
    ids = torch.randint(0, 128000, (1, 2048), generator=torch.Generator().manual_seed(0)).cuda()

    @torch.no_grad()
    def run() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def lora(model: Any) -> Callable[[], Any]:
    """Return one training step of a LoRA of rank 16 on all linears."""
    import peft

    settings = peft.LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, settings)
    tuned.train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(0, 128000, (4, 512), generator=torch.Generator().manual_seed(1)).cuda()

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(variant: str, layers: int, tasks: set[str], repeats: int) -> dict[str, Any]:
    """Return the figures of one variant."""
    model = llama(layers)
    result: dict[str, Any] = {}
    if variant != "bf16":
        holder = [model]
        made: list[Any] = []

        def quantize() -> None:
            given = holder.pop()
            name = variant.removeprefix("qhub_")
            made.append(with_bitsandbytes(given) if variant == "bnb_nf4" else with_qhub(given, QHUB[name]))

        result["quantize_s"] = round(seconds(quantize), 3)
        model = made.pop()
        # The first call compiles, tunes and loads what the method needs; a second one shows the method's own time.
        if "quantize" in tasks:
            holder.append(llama(layers))
            result["quantize_again_s"] = round(seconds(quantize), 3)
            made.clear()
    gc.collect()
    torch.cuda.empty_cache()
    result["resting_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)
    if "prefill" in tasks:
        result["prefill_ms"] = round(seconds(prefill(model), repeats, 2) * 1e3, 2)
    if "lora" in tasks:
        torch.cuda.reset_peak_memory_stats()
        step = lora(model)
        times_of(step, 5, 0)
        before = torch.cuda.memory_stats()["num_device_alloc"]
        steps = times_of(step, 2 * repeats, 0)
        # Memory asked of the driver, which waits for the device: none once a step's has been had.
        result["lora_device_allocations"] = torch.cuda.memory_stats()["num_device_alloc"] - before
        result["lora_ms"] = round(statistics.median(steps) * 1e3, 2)
        result["lora_steps_ms"] = [round(one * 1e3, 1) for one in steps]
        result["lora_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--tasks", default="quantize,prefill,lora")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further variant after so long")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    stored = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    run: dict[str, Any] = {
        "id": uuid.uuid4().hex[:12], "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe(),
        "model": f"Llama 3 8B shape, {arguments.layers} layers, random weights", "seed": 0,
        "autoload": os.environ.get("QHUB_AUTOLOAD", "1"), "variants": {}, "failed": {},
    }  # fmt: skip
    for variant in arguments.variants.split(","):
        if variant not in VARIANTS:
            parser.error(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
        if time.perf_counter() - begun > arguments.seconds:
            run["failed"][variant] = "not begun: out of time"
            continue
        try:
            run["variants"][variant] = measure(
                variant, arguments.layers, set(arguments.tasks.split(",")), arguments.repeats
            )
            print(variant, json.dumps(run["variants"][variant]), f"({time.perf_counter() - begun:.0f} s)", flush=True)
        except Exception as error:
            run["failed"][variant] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(variant, "FAILED", run["failed"][variant], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"runs": [*stored, run]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
