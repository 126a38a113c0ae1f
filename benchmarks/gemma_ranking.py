"""Ranks methods on a model that was trained by others (Gemma 3 270M): perplexity and KL divergence, weight-only.

As :mod:`quality`, but with fewer windows and samples, for a CPU: a method that needs data is given 24 windows of 512
tokens, 8 windows are read. Every configuration runs in a process of its own; finished ones are kept, so the command can
be stopped and given again. ``--peer``: the Python of an environment with gptqmodel, whose GPTQ is then ranked too::

    python benchmarks/gemma_ranking.py MODEL --text FILE --calibration FILE --out FILE --peer PYTHON
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LENGTH = 512
# Of the configurations in quality.py.
SAME = (
    "NF4", "HQQ 4-bit g64 axis 1", "GPTQ 4-bit g128", "GPTQ 4-bit g128 act-order", "GPTQ 4-bit g128 high",
    "AWQ 4-bit g128", "GPTQ 3-bit g128", "GPTQ 4-bit g128 ranges",
)  # fmt: skip
# GPTQ's files without data: nearest codes on grids that span each group's range.
NEAREST = {"round to nearest 4-bit g128": False, "round to nearest 4-bit g128 symmetric": True}
_PEER: dict[str, Any] = {"bits": 4, "group_size": 128, "damp_percent": 0.05}
PEERS = {
    "gptqmodel GPTQ 4-bit g128": _PEER,
    "gptqmodel GPTQ 4-bit g128 act-order": {**_PEER, "desc_act": True},
}


def rounded(folder: str, symmetric: bool) -> Any:
    """Return the model with its weights rounded to nearest, in float32."""
    from qhub_gptq.dynamic import Settings
    from qhub_gptq.plan import layout_of
    from qhub_gptq.quantize import Options, quantize
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            weight = module.weight.data
            layout = layout_of(Settings(4, 128, False, symmetric), *weight.shape)
            # Features that have nothing to do with each other: nothing makes up for another's error.
            parts = quantize(weight, layout, {"hessian": torch.eye(weight.shape[1])}, Options())
            weight.copy_(layout.dequantize(parts))
    return model


def calibrated(folder: str, config: dict[str, Any], tokens: torch.Tensor) -> Any:
    """Return the model, loaded in the checkpoint's dtype and quantized with ``tokens`` (samples, 512)."""
    from transformers import AutoModelForCausalLM

    import qhub
    from qhub.registry import registry

    model = AutoModelForCausalLM.from_pretrained(folder)
    parsed = registry.call(config["quant_method"], "qhub_config").parse(dict(config))
    qhub.quantize(model, parsed, data=[one[None] for one in tokens], progress=lambda done, total, text: None)
    return model


def widened(folder: str, model: Any) -> Any:
    """Return a float32 model with the values of ``model``."""
    from transformers import AutoModelForCausalLM

    from qhub import QuantizedTensor

    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            value = weight.dequantize(torch.float32) if isinstance(weight, QuantizedTensor) else weight.float()
            dense.get_parameter(name).copy_(value)
    return dense


def made(folder: str, name: str, tokens: torch.Tensor, saved: str) -> Any:
    """Return the float32 model for a configuration; ``saved``: where a peer put its checkpoint."""
    import quality
    from transformers import AutoModelForCausalLM

    if name in NEAREST:
        return rounded(folder, NEAREST[name])
    if name in PEERS:
        return widened(folder, AutoModelForCausalLM.from_pretrained(saved))
    if name in quality.CALIBRATED:
        return widened(folder, calibrated(folder, quality.CALIBRATED[name], tokens))
    return widened(folder, quality.on_the_fly(folder, *quality.CONFIGURATIONS[name])[0])


def run(folder: str, name: str, data: str, saved: str, result: str) -> None:
    """Quantize, measure, and write what was found to ``result``."""
    from transformers import AutoModelForCausalLM

    from qhub.evaluate import compare

    started, tensors = time.perf_counter(), load_file(data)
    model = made(folder, name, tensors["samples"], saved)
    seconds = time.perf_counter() - started
    found = compare(model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tensors["windows"])
    row = {
        "perplexity": found.model.value,
        "base_perplexity": found.base.value,
        "difference_error": found.difference_error,
        "losses": found.model.losses,
        "kl_mean": found.kl_mean,
        "top1": found.top1_agreement,
        "seconds_with_loading": seconds,
    }
    Path(result).write_text(json.dumps(row), encoding="utf-8")


def peer(folder: str, name: str, data: str, saved: str) -> None:
    """Write the checkpoint that gptqmodel makes with its defaults."""
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(folder, QuantizeConfig(**PEERS[name], offload_to_disk=False), device="cpu")
    samples = load_file(data)["samples"]
    model.quantize([{"input_ids": one[None], "attention_mask": torch.ones_like(one)[None]} for one in samples])
    model.save(saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", metavar="FILE")
    parser.add_argument("--calibration", metavar="FILE")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--bos", action="store_true", help="begin every window and sample with the begin token")
    parser.add_argument("--only", action="append")
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", nargs=4, metavar=("NAME", "DATA", "SAVED", "RESULT"), help=argparse.SUPPRESS)
    parser.add_argument("--run-peer", nargs=3, metavar=("NAME", "DATA", "SAVED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.run:
        run(arguments.model, *arguments.run)
    elif arguments.run_peer:
        peer(arguments.model, *arguments.run_peer)
    else:
        rank(arguments)


def rank(arguments: argparse.Namespace) -> None:
    """Run every configuration that has no result yet."""
    from transformers import AutoTokenizer

    from qhub.calibration.data import windows
    from qhub.evaluate import windows_of

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = Path(arguments.calibration).read_text(encoding="utf-8")
    samples = windows(tokenizer(text, add_special_tokens=False)["input_ids"], arguments.samples, LENGTH)
    read = windows_of(tokenizer, Path(arguments.text).read_text(encoding="utf-8"), count=arguments.windows)
    if arguments.bos:
        samples, read = ([_begun(one, tokenizer.bos_token_id) for one in many] for many in (samples, read[:, None]))
        read = torch.cat(read)
    known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {"rows": {}}
    names = arguments.only or [*NEAREST, *SAME, *(PEERS if arguments.peer else ())]
    with tempfile.TemporaryDirectory() as scratch:
        data, saved, result = (str(Path(scratch) / name) for name in ("data.safetensors", "saved", "result.json"))
        save_file({"samples": torch.cat(samples), "windows": read}, data)
        for name in names:
            if name in known["rows"]:
                continue
            command = [__file__, arguments.model]
            if name in PEERS:
                # Its pool asks for one thread more than it makes on a machine of one or two cores, and fails.
                environment = {**os.environ, "QHUB_AUTOLOAD": "0", "GPTQMODEL_CPU_WORKERS": "2"}
                subprocess.run([arguments.peer, *command, "--run-peer", name, data, saved], check=True, env=environment)
            subprocess.run([sys.executable, *command, "--run", name, data, saved, result], check=True)
            known["rows"][name] = json.loads(Path(result).read_text(encoding="utf-8"))
            print(name, json.dumps(known["rows"][name]), flush=True)
            known |= {
                "model": "Gemma 3 270M",
                "samples": arguments.samples,
                "windows": arguments.windows,
                "length": LENGTH,
                "bos": arguments.bos,
                "date": datetime.date.today().isoformat(),
                "python": platform.python_version(),
                "hardware": platform.machine(),
                "versions": {p: version(p) for p in ("qhub-core", "torch", "transformers")},
            }
            arguments.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _begun(window: torch.Tensor, token: int) -> torch.Tensor:
    """Return ``window`` (1, tokens) with ``token`` before it, as long as it was."""
    return torch.cat([torch.full_like(window[:, :1], token), window[:, :-1]], 1)


if __name__ == "__main__":
    main()
