"""Quantizes a real model with every method, measures each, draws the result, and sends one through a Hub and back.

Run by ``make demo``. The model is ``examples/models/doclm-5m``; figures follow the protocol of :mod:`qhub.evaluate`.
Nothing leaves this machine: the Hub is a server on the loopback interface.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import qhub
from qhub import QuantizedTensor, plugins
from qhub.evaluate import compare, decode_speed, windows_of
from qhub.testing.hub_server import HubServer

HERE = Path(__file__).resolve().parent
MODEL = HERE / "models" / "doclm-5m"
TEXT = HERE / "text" / "eval_mix.txt"
CALIBRATION = TEXT.with_name("calibration.txt")


@dataclass
class Row:
    """Is one line of the demo's table. ``bits``: per quantized weight, all its tensors counted."""

    method: str
    preset: str
    bits: float
    megabytes: float
    perplexity: float
    kl_mean: float
    top1: float
    tokens_per_second: float
    seconds: float


def measure(
    method: str, preset: str, config: dict[str, Any] | None, base: Any, tokens: Any, prompt: Any
) -> tuple[Row, Any]:
    """Load the model, quantized if ``config`` is given, and measure it against ``base``."""
    started = time.perf_counter()
    if config is not None and plugins.has(method, "qhub_calibration"):
        parsed = plugins.call(method, "qhub_config").parse({"quant_method": method, **config})
        model = AutoModelForCausalLM.from_pretrained(MODEL)
        qhub.quantize(model, parsed, data=CALIBRATION, samples=32, length=256, progress=lambda *where: None)
    else:
        arguments = {} if config is None else {"quantization_config": {"quant_method": method, **config}}
        model = AutoModelForCausalLM.from_pretrained(MODEL, **arguments)
    seconds = time.perf_counter() - started
    found = compare(model, base, tokens)
    speed = decode_speed(model, prompt, new_tokens=32, runs=3)
    weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    count = sum(w.numel() for w in weights)
    bits = 8 * sum(w.nbytes for w in weights) / count if count else 16.0
    size = model.get_memory_footprint() / 1e6
    row = Row(
        method,
        preset,
        bits,
        size,
        found.model.value,
        found.kl_mean,
        found.top1_agreement,
        speed.tokens_per_second,
        seconds,
    )
    return row, model


def draw(rows: list[Row], base: float, file: Path) -> None:
    """Draw perplexity over bits per weight, one point a configuration."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure, axes = plt.subplots(figsize=(9.5, 5.2), dpi=120)
    for order, method in enumerate(dict.fromkeys(row.method for row in rows)):
        points = [row for row in rows if row.method == method]
        # Ten colours, then the same ones in another shape.
        shape = "osD^"[order // 10 % 4]
        axes.scatter(
            [p.bits for p in points], [p.perplexity for p in points],
            s=48, label=method, zorder=3, color=f"C{order % 10}", marker=shape,
        )  # fmt: skip
        for point in points:
            near = [r for r in rows if abs(r.bits - point.bits) < 0.5 and 0.8 < r.perplexity / point.perplexity < 1.25]
            if len(near) > 3:
                # In a crowd names would cover each other; the table has them.
                continue
            # Methods of the same size lie close together: every second one is labelled below its points.
            place = (5, 6) if order % 2 else (5, -13)
            axes.annotate(
                point.preset, (point.bits, point.perplexity), xytext=place, textcoords="offset points", fontsize=8
            )
    axes.axhline(base, color="0.5", linewidth=1, linestyle="--", label="16-bit model")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([10, 13, 15, 20, 30, 50, 100, 200]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bits per quantized weight, scales and zeros counted")
    axes.set_ylabel("perplexity (log scale)")
    axes.set_title("doclm-5m, every installed method")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def through_the_hub(model: Any, console: Console) -> None:
    """Push ``model`` to a Hub on loopback and load it back in a process that imports only transformers."""
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        expected = model(ids).logits
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('demo/doclm-5m')\n"
        "torch.save(model(torch.arange(1, 17)[None]).logits.detach(), sys.argv[1])\n"
    )
    with HubServer(tokens={"hf_demo": "demo"}) as hub, tempfile.TemporaryDirectory() as folder:
        with hub.activate(token="hf_demo"):
            model.push_to_hub("demo/doclm-5m")
        pushed = hub.repo("demo/doclm-5m")
        environment = {**os.environ, **hub.environment(token="hf_demo", cache_dir=Path(folder) / "cache")}
        result = Path(folder) / "logits.pt"
        subprocess.run(
            [sys.executable, "-c", script, str(result)], check=True, env=environment, stderr=subprocess.DEVNULL
        )
        same = torch.equal(torch.load(result), expected)
        console.print(
            f"Pushed to {hub.endpoint} as demo/doclm-5m: {', '.join(sorted(pushed.files))}; tags {sorted(pushed.tags)}"
        )
        console.print(
            f"Loaded back in a process that imports only transformers: logits {'identical' if same else 'DIFFER'}"
        )
    if not same:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for demo.json and demo.png")
    parser.add_argument("--windows", type=int, default=6, help="windows of 512 tokens to read; the protocol has 24")
    parser.add_argument("--presets", type=int, default=2, help="how many of a method's presets, the usual ones first")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = windows_of(tokenizer, TEXT.read_text(encoding="utf-8"), count=arguments.windows)
    prompt = tokens[:1, :32]
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    reference, _ = measure("none", "bfloat16", None, base, tokens, prompt)

    jobs, silent = [], []
    for name in plugins.list():
        # A method without presets is measured with its defaults.
        presets = plugins.call(name, "qhub_config").presets or {"defaults": {}}
        if plugins.has(name, "qhub_quantize"):
            jobs += [(name, preset, dict(values)) for preset, values in list(presets.items())[: arguments.presets]]
        else:
            silent.append(name)
    rows, pushed = [reference], None
    for name, preset, values in track(jobs, description="Quantizing", console=console, transient=True):
        row, model = measure(name, preset, values, base, tokens, prompt)
        rows.append(row)
        pushed = pushed or model

    table = Table(title=f"doclm-5m, {len(tokens)} windows of {tokens.shape[1]} tokens of {TEXT.name}")
    for heading in ("method", "preset", "bits/weight", "MB", "perplexity", "KL mean", "top-1 %", "tokens/s", "seconds"):
        table.add_column(heading, justify="left" if heading in ("method", "preset") else "right")
    for row in rows:
        table.add_row(
            row.method, row.preset, f"{row.bits:.3f}", f"{row.megabytes:.1f}", f"{row.perplexity:.3f}",
            f"{row.kl_mean:.4f}", f"{100 * row.top1:.2f}", f"{row.tokens_per_second:.0f}", f"{row.seconds:.1f}",
        )  # fmt: skip
    console.print(table)
    if silent:
        console.print(f"Installed, but they only load checkpoints: {', '.join(silent)}")
    (arguments.out / "demo.json").write_text(
        json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8"
    )
    draw(rows[1:], reference.perplexity, arguments.out / "demo.png")
    console.print(f"Drawn: {arguments.out / 'demo.png'}")
    if pushed is None:
        console.print("No installed method can quantize: pip install qhub-bitsandbytes")
        raise SystemExit(1)
    through_the_hub(pushed, console)


if __name__ == "__main__":
    main()
