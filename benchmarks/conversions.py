"""Tries every conversion between the methods' own checkpoints: which are lossless, and why others are not.

``python benchmarks/conversions.py`` converts the checkpoints in the plugins' test data (tiny models that the methods'
own libraries wrote) to every installed method that takes over others' numbers, and writes
``benchmarks/results/conversions.json``. Nothing is quantized anew.
"""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qhub import convert
from qhub.errors import ConfigError, LossError
from qhub.registry import registry

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "conversions.json"
PACKAGES = ("qhub-core", "torch", "transformers")

# What each checkpoint is, and where it lies below plugins/.
SOURCES = {
    "GPTQ 4 bit, asymmetric": "qhub-gptq/tests/data/tiny-llama-b4-g32-asym",
    "GPTQ 4 bit, act-order": "qhub-gptq/tests/data/tiny-llama-b4-g32-act",
    "GPTQ 3 bit": "qhub-gptq/tests/data/tiny-llama-b3-g128-act-asym-v2",
    "AWQ gemm": "qhub-awq/tests/data/tiny-llama-gemm-g32",
    "AWQ gemv_fast": "qhub-awq/tests/data/tiny-llama-gemv_fast-g128",
    "compressed-tensors W4A16": "qhub-compressed-tensors/tests/data/tiny-llama-w4a16",
    "compressed-tensors NVFP4A16": "qhub-compressed-tensors/tests/data/tiny-llama-nvfp4a16",
    "compressed-tensors FP8 static": "qhub-compressed-tensors/tests/data/tiny-llama-fp8-static",
    "EETQ": "qhub-eetq/tests/data/tiny-llama",
    "fp8, blocks of 64": "qhub-fp8/tests/data/tiny-llama-b64",
    "torchao int8, int8 inputs": "qhub-torchao/tests/data/tiny-llama-int8-dynamic",
    "torchao intx, 4 bit": "qhub-torchao/tests/data/tiny-llama-intx4-g32",
    "HQQ 3 bit, axis 0": "qhub-hqq/tests/data/tiny-llama-b3-axis0",
    "GGUF Q4_K_M": "qhub-gguf/tests/data/q4_k_m/model.gguf",
}


def attempt(source: Path, target: str) -> dict[str, Any]:
    """Return whether the conversion is lossless, its seconds, and the reason if it is not."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        try:
            report = convert(source, target, Path(folder) / "out")
        except (LossError, ConfigError) as error:
            reason = next(iter(getattr(error, "losses", {}).values()), str(error))
            return {"lossless": False, "reason": reason.replace(str(source), source.name)}
        return {"lossless": report.lossless, "weights": report.weights, "seconds": time.perf_counter() - begun}


def main() -> None:
    targets = [name for name in registry.list() if registry.has(name, "qhub_adopt")]
    rows: dict[str, dict[str, Any]] = {}
    for title, place in SOURCES.items():
        source = ROOT / "plugins" / place
        rows[title] = {"targets": {target: attempt(source, target) for target in targets}}
        print(title, {target: found["lossless"] for target, found in rows[title]["targets"].items()})
    result = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
