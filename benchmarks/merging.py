"""Measures what merging an adapter into quantized weights keeps: KL from the adapter on top, on text held out.

A LoRA is trained once on the unquantized model, with text of a kind that the model has not seen, and put on the model
quantized in each way. Then it is merged: rounded to the nearest codes on the old grid, and on a refitted one, as every
library does that merges at all; and as qhub does by itself, without data. The measure is the KL of the merged model's
predictions from those of the same quantized model with the adapter on top, on another part of the text.

    python benchmarks/merging.py examples/models/doclm-5m examples/text --out benchmarks/results/merging.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from qhub.evaluate import kl_divergence
from qhub.merging import merging_with

_WINDOW, _HELD_OUT = 256, 16


def configs(texts: list[str], tokenizer: Any) -> dict[str, Any]:
    """Return the quantizations by name."""
    from transformers import AwqConfig, BitsAndBytesConfig, GPTQConfig, HqqConfig

    bnb = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    found: dict[str, Any] = {
        "NF4 nested": BitsAndBytesConfig(bnb_4bit_quant_type="nf4", **bnb),
        "FP4 nested": BitsAndBytesConfig(bnb_4bit_quant_type="fp4", **bnb),
        "LLM.int8()": BitsAndBytesConfig(load_in_8bit=True),
    }
    found |= {f"HQQ {bits} bit, 64": HqqConfig(nbits=bits, group_size=64) for bits in (4, 3, 2)}
    calibration = {"dataset": texts, "tokenizer": tokenizer}
    found |= {f"GPTQ {bits} bit, 128": GPTQConfig(bits=bits, group_size=128, **calibration) for bits in (4, 3, 2)}
    found["AWQ 4 bit, 128"] = AwqConfig(bits=4, group_size=128)
    return found


def train(model: Any, tokens: torch.Tensor, steps: int) -> Any:
    """Return ``model`` with a LoRA of rank 16 on all linear layers, trained for ``steps`` steps of 4 windows."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-4)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - _WINDOW, (4,))
        batch = torch.stack([tokens[start : start + _WINDOW] for start in starts])
        adapted(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


class HeldOut:
    """Holds windows that nothing was trained on."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._windows = tokens.reshape(_HELD_OUT, _WINDOW)

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        """Return logits (positions, vocabulary)."""
        return torch.cat([model(input_ids=window[None]).logits[0] for window in self._windows])

    def perplexity(self, logits: torch.Tensor) -> float:
        """Return exp(mean loss)."""
        shaped = logits.reshape(*self._windows.shape, -1)[:, :-1].flatten(0, 1)
        return math.exp(torch.nn.functional.cross_entropy(shaped, self._windows[:, 1:].flatten()))


def measure(adapted: Any, held_out: HeldOut) -> dict[str, Any]:
    """Return perplexities and KLs for one quantized model with the adapter on it."""
    on_top = held_out.logits(adapted)
    with adapted.disable_adapter():
        without = held_out.logits(adapted)
    row: dict[str, Any] = {
        "perplexity_adapter": held_out.perplexity(on_top),
        "perplexity_base": held_out.perplexity(without),
        "kl_base": float(kl_divergence(on_top, without).mean()),
    }
    ways: dict[str, dict[str, Any]] = {
        "nearest, grid kept": {"samples": 0, "grid": "keep"},
        "nearest, grid refitted": {"samples": 0, "grid": "refit"},
        "qhub": {},
    }
    for name, options in ways.items():
        start = time.perf_counter()
        with merging_with(**options):
            merged = copy.deepcopy(adapted).merge_and_unload()
        seconds = time.perf_counter() - start
        logits = held_out.logits(merged)
        kl = float(kl_divergence(on_top, logits).mean())
        row[name] = {"kl": kl, "perplexity": held_out.perplexity(logits), "seconds": seconds}
    return row


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, help="a folder with eval_handbook.txt and calibration.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    text = (given.texts / "eval_handbook.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    calibration = (given.texts / "calibration.txt").read_text(encoding="utf-8")
    pieces = [calibration[start : start + 2000] for start in range(0, 128_000, 2000)]
    load = transformers.AutoModelForCausalLM.from_pretrained
    learned, held_out = tokens[: -_HELD_OUT * _WINDOW], HeldOut(tokens[-_HELD_OUT * _WINDOW :])
    folder = given.out.with_suffix(".adapter")
    train(load(given.model, dtype=torch.float32), learned, given.steps).save_pretrained(folder)
    rows = {}
    for name, config in configs(pieces, tokenizer).items():
        model = load(given.model, quantization_config=config, dtype=torch.float32)
        rows[name] = measure(peft.PeftModel.from_pretrained(model, folder).eval(), held_out)
        print(name, json.dumps(rows[name]), flush=True)
    results = json.loads(given.out.read_text()) if given.out.is_file() else {}
    results[given.model.name] = {
        "steps": given.steps,
        "rows": rows,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "machine": f"{platform.machine()}, {given.threads} thread(s)",
        "date": time.strftime("%Y-%m-%d"),
    }
    given.out.write_text(json.dumps(results, indent=1) + "\n")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
