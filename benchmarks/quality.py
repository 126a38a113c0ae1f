"""Measures what quantizing costs a model in perplexity and KL divergence, per method and preset.

Weight-only, as the published comparisons are: each configuration is quantized, its weights are dequantized into a
float32 model, and that model is read on the protocol of :mod:`qhub.evaluate` (24 windows of 512 tokens of each text).
Methods that need data are given 128 windows of 512 tokens, evenly spaced over a text of its own, and stream from folder
to folder. Models and texts are arguments; the result is committed with versions::

    python benchmarks/quality.py MODEL --text mix=FILE --text handbook=FILE --calibration FILE --out FILE
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qhub import QuantizedTensor
from qhub.evaluate import compare, windows_of
from qhub.registry import registry

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
    # llama.cpp quantizes from a float32 file.
    **{
        f"GGUF {name}": ({"quant_method": "gguf", "file_type": name}, torch.float32)
        for name in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")
    },
}

# The peers' settings: gptqmodel quantizes from the checkpoint's bfloat16.
_GPTQ: dict[str, Any] = {"quant_method": "gptq", "group_size": 128, "damp_percent": 0.05}
_AWQ: dict[str, Any] = {"quant_method": "awq", "group_size": 128}
CALIBRATED: dict[str, dict[str, Any]] = {
    "GPTQ 4-bit g128": {**_GPTQ, "bits": 4},
    "GPTQ 4-bit g128 ranges": {**_GPTQ, "bits": 4, "mse": 0.0},
    "GPTQ 4-bit g128 act-order": {**_GPTQ, "bits": 4, "desc_act": True},
    "GPTQ 3-bit g128": {**_GPTQ, "bits": 3},
    "GPTQ 2-bit g128": {**_GPTQ, "bits": 2},
    "GPTQ 4-bit g128 high": {**_GPTQ, "bits": 4, "sym": False, "meta": {"quality": "high"}},
    "GPTQ 3-bit g128 high": {**_GPTQ, "bits": 3, "sym": False, "meta": {"quality": "high"}},
    "GPTQ 2-bit g128 high": {**_GPTQ, "bits": 2, "sym": False, "meta": {"quality": "high"}},
    "AWQ 4-bit g128": {**_AWQ, "bits": 4},
}


@dataclass(frozen=True)
class Text:
    """Is a named evaluation text, cut into windows."""

    name: str
    tokens: torch.Tensor


def on_the_fly(folder: str, config: dict[str, Any], dtype: torch.dtype) -> tuple[Any, float]:
    """Return the quantized model and the seconds that took."""
    started = time.perf_counter()
    host = _host_config(config["quant_method"], config)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=host, dtype=dtype)
    return model, time.perf_counter() - started


def calibrated(folder: str, config: dict[str, Any], text: str) -> tuple[Any, float]:
    """Return the model quantized with 128 windows of ``text``, and the seconds from folder to folder."""
    from qhub.integrations.transformers.streaming import quantize_folder
    from qhub.registry import registry

    # Small models, so in float32 on a GPU too: the peers' differences are in the methods, not in rounding activations.
    options = {"data": text, "samples": 128, "length": 512, "dtype": torch.float32}
    parsed = registry.call(config["quant_method"], "qhub_config").parse(dict(config))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        started = time.perf_counter()
        quantize_folder(folder, parsed, out, options=options)
        seconds = time.perf_counter() - started
        return AutoModelForCausalLM.from_pretrained(out), seconds


def measure(folder: str, model: Any, seconds: float, base: Any, texts: list[Text]) -> dict[str, Any]:
    """Return bits per weight, seconds, and per text perplexity and distances for one quantized model."""
    weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    bits = 8 * sum(w.nbytes for w in weights) / sum(w.numel() for w in weights)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            # Norms too: methods may have moved scales into them.
            value = weight.dequantize(torch.float32) if isinstance(weight, QuantizedTensor) else weight.float()
            dense.get_parameter(name).copy_(value)
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
    known = {"bitsandbytes": BitsAndBytesConfig, "hqq": HqqConfig}
    return known[method](**plain) if method in known else registry.call(method, "qhub_config").parse(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--calibration", metavar="FILE", help="text for the methods that need data")
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
    for name in [*CONFIGURATIONS, *(CALIBRATED if arguments.calibration else ())]:
        if arguments.only and name not in arguments.only:
            continue
        if name in CALIBRATED:
            model, seconds = calibrated(arguments.model, CALIBRATED[name], arguments.calibration)
        else:
            model, seconds = on_the_fly(arguments.model, *CONFIGURATIONS[name])
        rows[name] = measure(arguments.model, model, seconds, base, texts)
        print(name, json.dumps(rows[name]), flush=True)
        known["date"] = datetime.date.today().isoformat()
        known["python"] = platform.python_version()
        known["hardware"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        known["versions"] = {p: version(p) for p in ("qhub-core", "torch", "transformers")}
        arguments.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
