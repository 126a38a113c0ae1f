"""Writes the tables of the README from committed results; ``make tables`` runs it, a test checks that nothing is stale.

``benchmarks/results/conformance.json`` comes from ``python benchmarks/conformance.py``,
``benchmarks/results/demo.json`` from ``python examples/demo.py --windows 24 --out DIR`` (its ``demo.json`` and, as
``docs/images/demo.png``, its picture).
"""

from __future__ import annotations

import json
import re
import sys
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


def mark(tests: dict[str, dict[str, int]], names: tuple[str, ...]) -> str:
    """Return the cell for an ability: all passed, some failed, or not run."""
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
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    total = sum(count for m in result["methods"].values() for t in m["tests"].values() for count in t.values())
    return "\n".join(
        [
            *lines,
            "",
            f"From {total} runs of the conformance kit's tests on {result['date']}: Python {result['python']}, "
            f"{versions}; CPU only.",
        ]
    )


def demo_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of the demo."""
    lines = [
        "| method | preset | bits per weight | MB | perplexity | KL to float32 | top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = "none" if row["method"] == "none" else f"`{row['method']}`"
        lines.append(
            f"| {name} | {row['preset']} | {row['bits']:.3f} | {row['megabytes']:.1f} | {row['perplexity']:.3f} | "
            f"{row['kl_mean']:.4f} | {100 * row['top1']:.2f} % |"
        )
    note = (
        "doclm-5m, 24 windows of 512 tokens of examples/text/eval_mix.txt; `make demo` reads 6 windows and adds the "
        "speeds of your machine."
    )
    return "\n".join([*lines, "", note])


def filled(text: str, name: str, table: str) -> str:
    """Return ``text`` with the block ``name`` replaced by ``table``."""
    pattern = re.compile(rf"(<!-- table: {name} \(make tables\) -->\n).*?(<!-- end table -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no block for the table {name!r}")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def render(readme: str) -> str:
    """Return the README with its tables filled from the committed results."""
    conformance = json.loads((RESULTS / "conformance.json").read_text(encoding="utf-8"))
    demo = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    return filled(filled(readme, "methods", methods_table(conformance)), "demo", demo_table(demo))


def main() -> None:
    file = ROOT / "README.md"
    before = file.read_text(encoding="utf-8")
    after = render(before)
    if "--check" in sys.argv:
        raise SystemExit(0 if before == after else "README.md is stale: run `make tables`")
    file.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
