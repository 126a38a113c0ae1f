"""Writes the tables of README and docs from committed results; ``make tables`` runs it, a test finds what is stale.

``benchmarks/results/conformance.json`` comes from ``python benchmarks/conformance.py``,
``benchmarks/results/demo.json`` from ``python examples/demo.py --windows 24 --presets 99 --out DIR`` (its
``demo.json`` and, as ``docs/images/demo.png``, its picture), ``benchmarks/results/quality*.json`` from ``python
benchmarks/quality.py``, ``gemma_ranking.json``, ``peers_gptq.json``, ``calibration_gpu.json``, ``merging.json`` and
``loftq.json`` there from the scripts of these names.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Heading of a column and the tests of the conformance kit that must all pass for its check mark.
ABILITIES = {
    "quantizes": (
        "test_quantizing_gives_what_was_planned", "test_quantizes_in_a_process_that_imports_only_transformers",
    ),
    "reloads bit-identical": (
        "test_reloads_bit_identical_in_a_fresh_process", "test_sharded_save_reloads_bit_identical",
    ),
    "fused experts": ("test_mixture_of_experts_is_quantized_whole",),
    "LoRA trains": ("test_lora_trains",),
    "LoRA merges": ("test_lora_merges_and_reloads",),
    "dequantizes": ("test_dequantize_gives_a_dense_model",),
    "float64-checked": ("test_every_layer_matches_float64",),
    "bad files refused": (
        "test_truncated_file", "test_missing_entry", "test_surplus_entry", "test_wrong_shape", "test_wrong_dtype",
        "test_impossible_number", "test_unknown_config_key",
    ),
}  # fmt: skip

# Of a method, in the table of the demo.
_PRESETS = 4
# Of calibrating, in their order; reading and writing take no time where the model is in memory.
PHASES = ("capture", "statistics", "equalizing", "quantizing", "outputs")


def packages(versions: dict[str, str]) -> str:
    """Return packages with their versions, in a line."""
    return ", ".join(f"{package} {number}" for package, number in versions.items())


def mark(tests: dict[str, dict[str, int]], names: tuple[str, ...]) -> str:
    """Return the cell for an ability: all passed, some failed, or not run."""
    if "test_hostile_files" in tests and "test_truncated_file" in names:
        # Files that are no safetensors are damaged by the plugin's own tests.
        names = ("test_hostile_files",)
    counts = [tests.get(name, {}) for name in names]
    if any(count.get("failed") for count in counts):
        return "fails"
    if all(count.get("passed") for count in counts):
        return "✓"
    return "–"


def methods_table(result: dict[str, Any]) -> str:
    """Return the table of methods and abilities."""
    rows = [["method", "package", *ABILITIES], ["---"] * (2 + len(ABILITIES))]
    for name, method in result["methods"].items():
        cells = [mark(method["tests"], names) for names in ABILITIES.values()]
        rows.append([f"`{name}`", f"`{method['distribution']}`", *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    versions = packages(result["versions"])
    total = sum(count for m in result["methods"].values() for t in m["tests"].values() for count in t.values())
    return "\n".join(
        [
            *lines,
            "",
            f"From {total} runs of the conformance kit's tests on {result['date']}: Python {result['python']}, "
            f"{versions}; CPU only.",
        ]
    )


def conversions_table(result: dict[str, Any]) -> str:
    """Return the table of conversions: a check mark where every weight stays the number that it was."""
    targets = list(dict.fromkeys(target for row in result["rows"].values() for target in row["targets"]))
    rows = [["from", *(f"`{target}`" for target in targets)], ["---"] * (1 + len(targets))]
    for title, row in result["rows"].items():
        rows.append([title, *("✓" if row["targets"][target]["lossless"] else "–" for target in targets)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    note = f"{result['date']}, Python {result['python']}, {packages(result['versions'])}."
    return "\n".join([*lines, "", note])


def demo_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of the demo."""
    lines = [
        "| method | preset | bits per weight | MB | perplexity | KL to float32 | top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    shown: Counter[str] = Counter()
    for row in rows:
        shown[row["method"]] += 1
        if shown[row["method"]] > _PRESETS:
            continue
        name = "none" if row["method"] == "none" else f"`{row['method']}`"
        lines.append(
            f"| {name} | {row['preset']} | {row['bits']:.3f} | {row['megabytes']:.1f} | {row['perplexity']:.3f} | "
            f"{row['kl_mean']:.4f} | {100 * row['top1']:.2f} % |"
        )
    note = (
        f"doclm-5m, 24 windows of 512 tokens of examples/text/eval_mix.txt, {_PRESETS} presets of a method at most "
        "(the picture has all); `make demo` reads 6 windows and adds the speeds of your machine."
    )
    return "\n".join([*lines, "", note])


def quality_table(rows: dict[str, Any], peers: dict[str, Any], note: str) -> str:
    """Return the table of one model: every configuration, and the peer's figures where there are any."""
    lines = [
        "| configuration | bits per weight | perplexity | KL | top-1 | elsewhere: perplexity | KL | top-1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        mix, peer = row["mix"], peers.get(name)
        other = "| | | |"
        if peer is not None:
            other = f"| {peer['perplexity']:.3f} | {peer['kl_mean']:.4f} | {100 * peer['top1']:.1f} % |"
        lines.append(
            f"| {name} | {row['bits_per_weight']:.3f} | {mix['perplexity']:.3f} | {mix['kl_mean']:.4f} | "
            f"{100 * mix['top1']:.1f} % {other}"
        )
    return "\n".join([*lines, "", note])


def quality_tables() -> str:
    """Return the tables of all models."""
    results = [
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("quality", "quality_calibrated", "quality_gguf")
    ]
    peers = json.loads((RESULTS / "peers_quality.json").read_text())
    pieces = []
    for model in results[1]["models"]:
        rows = {name: row for result in results for name, row in result["models"].get(model, {}).items()}
        base = next(iter(rows.values()))["mix"]["base_perplexity"]
        note = f"The 16-bit model: {base:.3f}. Elsewhere: {peers['source']}."
        pieces.append(f"### {model}\n\n{quality_table(rows, peers['models'].get(model, {}), note)}")
    where = "; ".join(
        f"{', '.join(f'{package} {number}' for package, number in result['versions'].items())}, Python "
        f"{result['python']}, {result.get('hardware', 'CPU')}, {result['date']}"
        for result in results
    )
    return "\n\n".join([*pieces, f"Measured with: {where}."])


def times_table() -> str:
    """Return what quantizing with GPTQ takes, here and elsewhere."""
    peers = json.loads((RESULTS / "peers_gptq.json").read_text())
    (model, found), *_ = peers["models"].items()
    medians = found["medians"]["seconds"]
    ours = medians["qhub, mse=0.0"]
    lines = [
        f"| GPTQ 4-bit g128, {model}, {found['samples']} x {found['length']} tokens | seconds | ratio |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {seconds:.1f} | {seconds / ours:.2f} |" for name, seconds in sorted(medians.items())]
    gpu = json.loads((RESULTS / "calibration_gpu.json").read_text())
    phases = [phase for phase in PHASES if any(phase in run["phases"] for run in gpu["runs"].values())]
    lines += [
        "",
        f"| {gpu['model']}, {gpu['samples']}, one {gpu['gpu']} | seconds | {' | '.join(phases)} | peak memory |",
        "|---" * (len(phases) + 3) + "|",
    ]
    for name, run in gpu["runs"].items():
        parts = " | ".join(f"{run['phases'][phase]:.1f}" if phase in run["phases"] else "" for phase in phases)
        lines.append(f"| {name} | {run['seconds']:.0f} | {parts} | {run['peak_gib']:.0f} GiB |")
    versions = packages(gpu["versions"])
    return "\n".join([*lines, "", f"On the GPU with {versions}, Python {gpu['python']}, {gpu['date']}."])


def ranking_table() -> str:
    """Return the ranking on the model that was trained by others, without and with the token a text begins with."""
    found = json.loads((RESULTS / "gemma_ranking.json").read_text())
    begun = json.loads((RESULTS / "gemma_ranking_bos.json").read_text())
    lines = [
        "| configuration | KL | top-1 | perplexity | after the begin token: KL | top-1 | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(found["rows"].items(), key=lambda pair: pair[1]["kl_mean"]):
        other = ranking_cells(begun["rows"][name]) if name in begun["rows"] else "| |"
        lines.append(f"| {name} | {ranking_cells(row)} | {other} |")
    bases = [next(iter(one["rows"].values()))["base_perplexity"] for one in (found, begun)]
    versions = packages(found["versions"])
    note = (
        f"{found['model']}, {found['windows']} windows read, {found['samples']} samples of {found['length']} tokens. "
        f"The 16-bit model: {bases[0]:.2f}, after the begin token {bases[1]:.2f}. ±: standard error of the difference "
        f"from it. Measured with: {versions}, Python {found['python']}, CPU, {found['date']}."
    )
    return "\n".join([*lines, "", note])


def ranking_cells(row: dict[str, Any]) -> str:
    """Return the cells of one configuration."""
    perplexity = f"{row['perplexity']:.2f} ± {row['difference_error']:.2f}"
    return f"{row['kl_mean']:.3f} | {100 * row['top1']:.1f} % | {perplexity}"


def qlora_table() -> str:
    """Return the held-out perplexities before and after training an adapter, on 16 bits and on NF4."""
    runs = json.loads((RESULTS / "qlora.json").read_text())["runs"]
    lines = [
        "| model, seed | 16-bit: before | after | NF4: before | after | NF4 to 16-bit, after |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        cells = " | ".join(f"{curve[0][1]:.2f} | {curve[-1][1]:.2f}" for curve in run["curves"].values())
        lines.append(f"| {run['model']}, {run['seed']} | {cells} | {100 * (run['ratio'] - 1):+.2f} % |")
    one = runs[0]
    versions = packages(one["versions"])
    note = (
        f"Perplexity on the text's last 24 windows; {one['steps']} steps of {one['batch']} x {one['length']} tokens, "
        f"rank {one['rank']}, {one['optim']}. `python examples/qlora.py --model FOLDER --seed N` on one "
        f"{one['hardware']}, {versions}, {one['date']}."
    )
    return "\n".join([*lines, "", note])


def memory_table() -> str:
    """Return the peak memory of one LoRA step."""
    found = json.loads((RESULTS / "lora_memory.json").read_text())
    lines = [
        "| MB: at rest + step = peak | bf16 | bitsandbytes NF4 | bitsandbytes NF4, 16-bit rest | qhub NF4 |",
        "|---|---|---|---|---|",
    ]
    columns = ("bf16", "bitsandbytes", "bitsandbytes, 16-bit rest", "qhub")
    for model, result in found["models"].items():
        for suffix in ("", ", checkpointing"):
            cases = [result["cases"][f"{column}{suffix}"] for column in columns]
            cells = [f"{c['held'] / 1e6:.0f} + {c['step'] / 1e6:.0f} = {c['total'] / 1e6:.1f}" for c in cases]
            lines.append(f"| {model}, {result['batch']} x {result['length']}{suffix} | {' | '.join(cells)} |")
    spread = max(case["spread"] for result in found["models"].values() for case in result["cases"].values())
    ours, peers = (packages(found[key]) for key in ("versions", "peer"))
    note = (
        f"One step of LoRA, rank {found['rank']}, all linear layers, AdamW, bfloat16 autocast. NF4 has nested scales. "
        "PEFT's preparation casts what bitsandbytes leaves unquantized to float32; the third column is bitsandbytes "
        "without that, as qhub's models are in any case. At rest: weights, adapter, optimizer, counted; step: what the "
        "kernel saw on top, the smallest of up to three processes, which differ by up to "
        f"{spread / 1e6:.1f} MB. `python benchmarks/lora_memory.py` on {found['hardware']}, {found['date']}: {ours}, "
        f"Python {found['python']}; bitsandbytes: {peers}."
    )
    return "\n".join([*lines, "", note])


def merging_table() -> str:
    """Return what is left of an adapter that is merged, per method and way of rounding."""
    found = json.loads((RESULTS / "merging.json").read_text())
    ways = ("nearest, grid kept", "nearest, grid refitted", "qhub")
    lines = [
        "| KL from the adapter on top | without it | nearest codes, old grid | nearest, refitted | qhub "
        "| perplexity: on top | without | qhub |",
        "|---" * 8 + "|",
    ]
    for model, result in found.items():
        for name, row in result["rows"].items():
            kls = [row["kl_base"], *(row[way]["kl"] for way in ways)]
            perplexities = [row["perplexity_adapter"], row["perplexity_base"], row["qhub"]["perplexity"]]
            cells = [f"{value:.3f}" for value in kls] + [f"{value:.2f}" for value in perplexities]
            lines.append(f"| {model}, {name} | {' | '.join(cells)} |")
    last = result
    versions = packages(last["versions"])
    note = (
        f"A LoRA of rank 16 on all linear layers, {last['steps']} steps on text that the model had not seen, measured "
        f"on 16 windows of it that were held out. `python benchmarks/merging.py`, {last['date']}: {versions}, CPU."
    )
    return "\n".join([*lines, "", note])


def loftq_table() -> str:
    """Return how near to 16 bits LoRA starts, with zeros and with LoftQ."""
    found = json.loads((RESULTS / "loftq.json").read_text())
    lines = [
        "| start at | zeros: error | KL | 1 step: error | KL | 5 steps: error | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        pairs = [
            (row["error"], row["zeros"]["kl"]),
            *((row[f"{n} steps"]["error"], row[f"{n} steps"]["kl"]) for n in (1, 5)),
        ]
        cells = " | ".join(f"{100 * error:.1f} % | {kl:.3f}" for error, kl in pairs)
        lines.append(f"| {name} | {cells} |")
    versions = packages(found["versions"])
    note = (
        f"{found['model']}, rank {found['rank']} on all linear layers. Error: of the weights, relative, mean over "
        "layers; KL: of the predictions from the 16-bit model's. "
        f"`python benchmarks/loftq.py`, {found['date']}: {versions}, CPU."
    )
    return "\n".join([*lines, "", note])


def filled(text: str, name: str, table: str) -> str:
    """Return ``text`` with the block ``name`` replaced by ``table``."""
    pattern = re.compile(rf"(<!-- table: {name} \(make tables\) -->\n).*?(<!-- end table -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"the page has no block for the table {name!r}")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def render(file: Path) -> str:
    """Return the page with its tables filled from the committed results."""
    text = file.read_text(encoding="utf-8")
    if file.name == "adapters.md":
        return filled(filled(text, "merging", merging_table()), "loftq", loftq_table())
    if file.name == "training.md":
        return filled(filled(text, "qlora", qlora_table()), "memory", memory_table())
    if file.name == "converting.md":
        return filled(text, "conversions", conversions_table(json.loads((RESULTS / "conversions.json").read_text())))
    if file.name == "quality.md":
        text = filled(filled(text, "quality", quality_tables()), "ranking", ranking_table())
        return filled(text, "times", times_table())
    conformance = json.loads((RESULTS / "conformance.json").read_text(encoding="utf-8"))
    demo = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    return filled(filled(text, "methods", methods_table(conformance)), "demo", demo_table(demo))


def main() -> None:
    pages = [ROOT / "docs" / name for name in ("converting.md", "quality.md", "training.md", "adapters.md")]
    for file in (ROOT / "README.md", *pages):
        after = render(file)
        if "--check" not in sys.argv:
            file.write_text(after, encoding="utf-8")
        elif after != file.read_text(encoding="utf-8"):
            raise SystemExit(f"{file.relative_to(ROOT)} is stale: run `make tables`")


if __name__ == "__main__":
    main()
