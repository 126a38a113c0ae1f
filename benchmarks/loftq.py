"""Measures where LoRA starts with LoftQ: relative error of the weights, and KL of the predictions, from 16 bits.

python benchmarks/loftq.py examples/models/doclm-5m examples/text --out benchmarks/results/loftq.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from merging import configs

import qhub
from qhub.evaluate import kl_divergence

# Of those that merging is measured on.
NAMES = (
    "NF4 nested",
    *(f"{name} {bits} bit, {group}" for bits in (4, 3, 2) for name, group in (("GPTQ", 128), ("HQQ", 64))),
)
_WINDOWS, _LENGTH, _RANK = 12, 256, 16


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, help="a folder with eval_mix.txt and calibration.txt")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    text, calibration = ((given.texts / f"{name}.txt").read_text("utf-8") for name in ("eval_mix", "calibration"))
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    windows = tokens[: _WINDOWS * _LENGTH].reshape(_WINDOWS, _LENGTH)
    pieces = [calibration[start : start + 2000] for start in range(0, 128_000, 2000)]

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return torch.cat([model(input_ids=window[None]).logits[0] for window in windows])

    expected = logits(load(given.model, dtype=torch.float32))
    rows: dict[str, Any] = {}
    quantizations = configs(pieces, tokenizer)
    for name in NAMES:
        base = load(given.model, quantization_config=quantizations[name], dtype=torch.float32)
        model = peft.get_peft_model(base, peft.LoraConfig(r=_RANK, target_modules="all-linear")).eval()
        row: dict[str, Any] = {"zeros": {"kl": float(kl_divergence(expected, logits(model)).mean())}}
        for steps in (1, 5):
            report = qhub.loftq_init(model, given.model, steps=steps)
            row.setdefault("error", report.before)
            kl = float(kl_divergence(expected, logits(model)).mean())
            row[f"{steps} steps"] = {"error": report.after, "kl": kl}
        rows[name] = row
        print(name, json.dumps(row), flush=True)
    results = {
        "model": given.model.name,
        "rank": _RANK,
        "rows": rows,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
