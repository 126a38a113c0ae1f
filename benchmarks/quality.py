"""Measures what quantizing costs a model in perplexity and KL divergence, per method and preset.

Weight-only, as the published comparisons are: each configuration is quantized through ``from_pretrained``, its weights
are dequantized into a float32 model, and that model is read on the protocol of :mod:`qhub.evaluate` (24 windows of 512
tokens of each text). Models and texts are arguments; the result is committed with versions::

    python benchmarks/quality.py MODEL --text mix=FILE --text handbook=FILE --out benchmarks/results/quality.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qhub import QuantizedTensor
from qhub.evaluate import compare, windows_of

# The settings of the peers: bitsandbytes from float32 weights (int8 rounds through float16 itself), hqq with float16
# scales.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "NF4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, torch.float32),
    "NF4 nested": (
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
        torch.float32,
    ),
    "FP4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, torch.float32),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, torch.float32),
    "HQQ 4-bit g64 axis 1": ({"quant_method": "hqq", "nbits": 4, "group_size": 64, "axis": 1}, torch.float16),
    "HQQ 4-bit g64 axis 0": ({"quant_method": "hqq", "nbits": 4, "group_size": 64, "axis": 0}, torch.float16),
    "HQQ 3-bit g64 axis 1": ({"quant_method": "hqq", "nbits": 3, "group_size": 64, "axis": 1}, torch.float16),
    "HQQ 2-bit g64 axis 1": ({"quant_method": "hqq", "nbits": 2, "group_size": 64, "axis": 1}, torch.float16),
}


@dataclass(frozen=True)
class Text:
    """Is a named evaluation text, cut into windows."""

    name: str
    tokens: torch.Tensor


def measure(folder: str, config: dict[str, Any], dtype: torch.dtype, base: Any, texts: list[Text]) -> dict[str, Any]:
    """Return bits per weight, seconds, and per text perplexity and distances for one configuration."""
    method = config["quant_method"]
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=_host_config(method, config), dtype=dtype)
    seconds = time.perf_counter() - started
    weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    bits = 8 * sum(w.nbytes for w in weights) / sum(w.numel() for w in weights)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if isinstance(weight, QuantizedTensor):
            with torch.no_grad():
                dense.get_parameter(name).copy_(weight.dequantize(torch.float32))
    result: dict[str, Any] = {"bits_per_weight": bits, "load_seconds": seconds}
    for text in texts:
        found = compare(dense, base, text.tokens)
        result[text.name] = {
            "perplexity": found.model.value,
            "base_perplexity": found.base.value,
            "kl_mean": found.kl_mean,
            "kl_p99": found.kl_p99,
            "top1": found.top1_agreement,
        }
    return result


def _host_config(method: str, values: dict[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig, HqqConfig

    plain = {key: value for key, value in values.items() if key != "quant_method"}
    return {"bitsandbytes": BitsAndBytesConfig, "hqq": HqqConfig}[method](**plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--only", action="append", help="measure these configurations alone")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = []
    for pair in arguments.text:
        name, _, file = pair.partition("=")
        texts.append(Text(name, windows_of(tokenizer, Path(file).read_text(encoding="utf-8"))))
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {"models": {}}
    rows = known["models"].setdefault(Path(arguments.model).name, {})
    for name, (config, dtype) in CONFIGURATIONS.items():
        if arguments.only and name not in arguments.only:
            continue
        rows[name] = measure(arguments.model, config, dtype, base, texts)
        print(name, json.dumps(rows[name]), flush=True)
        known["date"] = datetime.date.today().isoformat()
        known["python"] = platform.python_version()
        known["versions"] = {p: version(p) for p in ("qhub-core", "torch", "transformers")}
        arguments.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
