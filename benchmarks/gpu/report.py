"""Writes docs/performance.md and its pictures from committed results, by one command.

    python -m benchmarks.gpu.report [--merge FILE...] [--check]

Reads ``gpu_{grid,end_to_end,host,reading,experts}.json`` and ``gpu_generate*.json`` in ``benchmarks/results``.
``--merge``: first puts the runs of these files into ``gpu_grid.json`` (by their ids, so that a file may be given
twice).
``--check``: writes nothing and fails if the page is not that of the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import (
    ROWS,
    Run,
    best_peer,
    ceiling,
    error_ratio,
    fraction,
    load,
    lookup,
    merge,
    shapes_of,
    value,
)
from benchmarks.gpu.goals import goal_rows
from benchmarks.gpu.texts import EXPERTS, HEAD, HOST, METHOD, READING, REST

__all__ = ["document", "main"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Results besides the grid's, each in a file of its own.
OTHERS = ("end_to_end", "host", "reading", "experts")
# Which peers' groups qhub's contestants are compared with in their cells.
RIVALS = {"int4_zeros": "int4", "int4": "int4", "nf4": "nf4", "nf4_nested": "nf4_nested"}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def contestants_of(runs: Sequence[Run]) -> list[str]:
    """Return the names with at least one cell, qhub's first, then in the order they were first measured."""
    names = list(dict.fromkeys(cell["contestant"] for run in runs for cell in run["cells"]))
    return sorted(names, key=lambda name: not name.startswith("qhub"))


def times_table(runs: Sequence[Run], n: int, k: int, rows: Sequence[int], regime: str) -> str:
    """Return the microseconds of one shape; for qhub's, in brackets, how many times as fast as the cell's best peer."""
    lines = []
    for name in contestants_of(runs):
        cells = []
        for m in rows:
            own = lookup(runs, name, n, k, m, regime)
            if own is None:
                cells.append("")
                continue
            cell, run = own
            text = f"{value(cell):.1f}"
            rival = None if cell["peer"] else best_peer(run, rivals(cell["group"]), n, k, m, regime)
            if rival is not None:
                text += f" [{value(rival) / value(cell):.2f}]"
            cells.append(text)
        if any(cells):
            lines.append([name, *cells])
    return markdown(["us", *(f"M={m}" for m in rows)], lines)


def rivals(group: str) -> set[str]:
    """Return the groups whose peers a contestant of ``group`` is compared with; where nobody else has its kind, the
    dense product."""
    peers = {"int4", "nf4", "nf4_nested", "int8_dynamic", "fp8_dynamic"}
    return {RIVALS.get(group, group)} if RIVALS.get(group, group) in peers else {"dense"}


def fraction_table(runs: Sequence[Run], n: int, k: int, rows: Sequence[int]) -> str:
    """Return what part of the roofline each contestant reaches at one shape."""
    lines = []
    for name in contestants_of(runs):
        cells = []
        for m in rows:
            own = lookup(runs, name, n, k, m)
            part = fraction(*own) if own else None
            cells.append(f"{part[0]:.2f}" if part else "")
        if any(cells):
            lines.append([name, *cells])
    return markdown(["fraction", *(f"M={m}" for m in rows)], lines)


def errors_table(runs: Sequence[Run]) -> str:
    """Return each contestant's largest error, and its largest ratio to cuBLAS's own in the same cell."""
    lines = []
    for name in contestants_of(runs):
        cells = [(cell, run) for run in runs for cell in run["cells"] if cell["contestant"] == name]
        plain = max(cell["error"] for cell, _ in cells if cell["error"] is not None)
        own = [cell["own_error"] for cell, _ in cells if cell.get("own_error") is not None]
        ratios = [ratio for cell, run in cells if (ratio := error_ratio(cell, run)) is not None]
        lines.append(
            [
                name,
                f"{plain:.4f}",
                f"{max(own):.4f}" if own else "",
                f"{max(ratios):.2f}" if ratios else "",
                f"{sum(ratios) / len(ratios):.2f}" if ratios else "",
            ]
        )
    head = ["contestant", "largest error", "after its own rounding of x", "over cuBLAS's, largest", "mean"]
    return markdown(head, lines)


def absent_table(runs: Sequence[Run]) -> str:
    """Return who could not be had, failed or was wrong, and why; what another run has timed is left out."""
    lines = []
    have = set(contestants_of(runs))
    missing = {name: reason for run in runs for name, reason in run["missing"].items() if name not in have}
    lines += [[name, reason] for name, reason in missing.items()]
    for kind in ("failed", "wrong"):
        found: dict[str, list[str]] = {}
        for cell in (cell for run in runs for cell in run[kind]):
            if lookup(runs, cell["contestant"], cell["n"], cell["k"], cell["m"]) is None:
                why = cell["reason"] if kind == "failed" else f"error {cell['error']:.4f} above {cell['limit']:g}"
                found.setdefault(cell["contestant"], []).append(f"{cell['n']}x{cell['k']} M={cell['m']}: {why}")
        lines += [[name, f"{kind}, not timed, {len(cells)} cells; {cells[0]}"] for name, cells in found.items()]
    return markdown(["contestant", "why"], ([name, text.replace("|", "/")] for name, text in lines)) if lines else ""


def machine_text(runs: Sequence[Run]) -> str:
    """Return what was measured on, one line for each start of a machine."""
    lines: dict[str, str] = {}
    for run in runs:
        machine = run["machine"]
        # Read right after the card had worked; before, it rests at a lower clock.
        read = {**machine["read"], **run["ceilings"][0].get("read", {})}
        speeds = [f"{ceiling(run, name) or 0:.0f}" for name in ("copy_gbs", "bf16_tflops")]
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        lines[machine["start"]] = (
            f"- {run['date'][:10]}, {machine['gpu']}, driver {read.get('driver_version', '?')}, power limit "
            f"{read.get('power.limit', '?')}, SM clock read {read.get('clocks.sm', '?')} of "
            f"{read.get('clocks.max.sm', '?')}, memory {read.get('clocks.mem', '?')}; copy {speeds[0]} GB/s, bf16 "
            f"8192^3 {speeds[1]} TFLOP/s; Python {machine['python']}, CUDA {machine['cuda']}; {versions}; seed "
            f"{run['seed']}."
        )
    return "\n".join(lines.values())


def control_text(runs: Sequence[Run]) -> str:
    """Return how far the null control's two entries are apart."""
    apart = []
    for run in runs:
        cells = {(c["contestant"], c["n"], c["k"], c["m"], c["regime"]): value(c) for c in run["cells"]}
        apart += [
            abs(cells["cublas_bf16_again", *place] / figure - 1)
            for (name, *place), figure in cells.items()
            if name == "cublas_bf16" and ("cublas_bf16_again", *place) in cells
        ]
    if not apart:
        return ""
    apart.sort()
    return (
        f"Null control (cuBLAS twice in the same rotation, {len(apart)} cells): median {apart[len(apart) // 2]:.1%}, "
        f"at most {apart[-1]:.1%} apart."
    )


def host_table(host: dict[str, Any]) -> str:
    """Return the host's cost of one eager call of a layer, in the last run."""
    costs = host["runs"][-1]["host_us"]
    plain = costs["nn_linear"]
    return markdown(
        ["layer", "us a call", "over nn.Linear's"],
        ([name, f"{cost:.0f}", f"{cost - plain:+.0f}"] for name, cost in costs.items()),
    )


def reading_table(reading: dict[str, Any], runs: Sequence[Run]) -> str:
    """Return how long reading as much as a 4-bit weight takes, beside its product at M=1."""
    lines = []
    for cell in reading["runs"][-1]["cells"]:
        own = lookup(runs, "qhub_int4", cell["n"], cell["k"], 1)
        taken = value(own[0]) if own else None
        lines.append(
            [
                f"{cell['n']}x{cell['k']}", f"{cell['bytes'] / 1e6:.1f}", f"{cell['us']:.1f}",
                f"{cell['bytes'] / cell['us'] / 1e3:.0f}", f"{taken:.1f}" if taken else "",
                f"{cell['us'] / taken:.2f}" if taken else "",
            ]
        )  # fmt: skip
    return markdown(["weight", "MB", "reading, us", "GB/s", "qhub_int4 M=1, us", "reading over it"], lines)


def experts_table(experts: dict[str, Any]) -> str:
    """Return the times of experts; in brackets how many times as fast as the faster of bf16's implementations."""
    cells = {(cell["model"], cell["layout"], cell["tokens"]): cell for run in experts["runs"] for cell in run["cells"]}
    tokens = sorted({place[2] for place in cells})
    lines = []
    for model, layout in dict.fromkeys(place[:2] for place in cells):
        line = [model, layout]
        for count in tokens:
            times = cells.get((model, layout, count), {}).get("us", {})
            dense = [us for name, us in times.items() if name != "qhub"]
            line.append(f"{times['qhub']:.0f} [{min(dense) / times['qhub']:.1f}]" if "qhub" in times and dense else "")
        lines.append(line)
    return markdown(["experts", "layout", *(f"{count} token{'s' * (count > 1)}, us" for count in tokens)], lines)


def end_to_end_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return quantization, prefill and LoRA step of the 8B shape; the latest figure of each variant."""
    found: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: run["date"]):
        for name, figures in run["variants"].items():
            found[name] = {**found.get(name, {}), **figures}
    columns = ("quantize_s", "quantize_again_s", "prefill_ms", "lora_ms", "lora_peak_gib", "resting_gib")
    head = ["variant", "quantize s", "again s", "prefill 2048, ms", "LoRA step, ms", "its peak GiB", "resting GiB"]
    return markdown(
        head, ([name, *(str(figures.get(column, "")) for column in columns)] for name, figures in found.items())
    )


def generate_table(result: dict[str, Any]) -> str:
    """Return tokens/s of ``generate``."""
    head = ["variant", "batch", "prompt", "tokens/s", "ms a step", "prefill ms", "setup s", "peak GiB"]
    return markdown(
        head,
        (
            [
                row["variant"], str(row["batch"]), str(row["prompt"]), f"{row['tokens_per_s']:.0f}",
                f"{row['ms_per_step']:.2f}", f"{row['prefill_ms']:.1f}",
                f"{row['setup_s']:.1f}" if "setup_s" in row else "",
                f"{row['peak_gib']:.1f}" if "peak_gib" in row else "",
            ]
            for row in result["runs"]
        ),
    )  # fmt: skip


def document(grid: Sequence[Run], others: dict[str, dict[str, Any] | None]) -> str:
    """Return docs/performance.md; ``others``: of :func:`read_others`."""
    parts = [HEAD]
    generate, end_to_end, host = others["generate"], others["end_to_end"], others["host"]
    speeds = None
    if generate is not None:
        one = [row for row in generate["runs"] if row["batch"] == 1 and row["prompt"] == 32]
        speeds = {row["variant"]: row["tokens_per_s"] for row in one if not row["variant"].startswith("int4-eager")}
    marks = {True: "met", False: "not met", None: "not measured"}
    found = goal_rows(grid, speeds, host["runs"] if host else ())
    rows = ([r.what, r.goal, r.measured, marks[r.met], r.gap] for r in found)
    parts += ["## Goals", markdown(["what", "goal", "measured", "", "gap"], rows)]
    parts += [REST.strip(), "## Machine", machine_text(grid), control_text(grid)]
    rows_seen = [m for m in ROWS if any(cell["m"] == m for run in grid for cell in run["cells"])]
    parts += ["## Pictures"]
    parts += [f"![{title}](images/{name}.png)" for name, title in (
        ("performance-int4", "fraction of the roofline, 4-bit weights in groups of 128"),
        ("performance-layouts", "speed over cuBLAS bf16 of every layout"),
    )]  # fmt: skip
    parts += ["## Times", METHOD]
    for n, k in shapes_of(grid):
        parts += [f"### N={n}, K={k}", times_table(grid, n, k, rows_seen, "busy"), "Fraction of the roofline:"]
        parts.append(fraction_table(grid, n, k, rows_seen))
        rested = [m for m in rows_seen if any(lookup(grid, "cublas_bf16", n, k, m, "rested") for _ in (0,))]
        if rested:
            parts += ["On a rested card (8 ms idle before each replay):", times_table(grid, n, k, rested, "rested")]
    parts += ["## Errors", errors_table(grid)]
    absent = absent_table(grid)
    if absent:
        parts += ["## Not measured", absent]
    if others["reading"] is not None:
        parts += ["## Reading alone", READING, reading_table(others["reading"], grid)]
    if others["experts"] is not None:
        parts += ["## Experts", EXPERTS, experts_table(others["experts"])]
    if host is not None:
        parts += ["## Host cost of one eager call (M=1)", HOST, host_table(host)]
    if end_to_end is not None:
        parts += ["## Llama-3-8B shape: quantizing, prefill, LoRA step", end_to_end_table(end_to_end["runs"])]
    if generate is not None:
        parts += ["## Llama-3-8B shape: generate", generate_table(generate), generate.get("note", "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def read(path: Path) -> dict[str, Any] | None:
    """Return a result file; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def read_generate(folder: Path) -> dict[str, Any] | None:
    """Return what the files of ``generate`` hold together; None where there is none."""
    found = [read(path) or {} for path in sorted(folder.glob("gpu_generate*.json"))]
    if not found:
        return None
    notes = " ".join(one["note"] for one in found if "note" in one)
    return {"runs": [row for one in found for row in one["runs"]], "note": notes}


def read_others(folder: Path) -> dict[str, dict[str, Any] | None]:
    """Return the results in a folder besides the grid's, by name."""
    others = {name: read(folder / f"gpu_{name}.json") for name in OTHERS}
    return {**others, "generate": read_generate(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merge", type=Path, nargs="+", default=[])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    store = arguments.results / "gpu_grid.json"
    runs = merge(load([path for path in (store, *arguments.merge) if path.exists()]))
    if arguments.merge:
        store.write_text(json.dumps({"runs": runs}, separators=(",", ":")) + "\n")
    page = arguments.docs / "performance.md"
    text = document(runs, read_others(arguments.results))
    if arguments.check:
        if not page.exists() or page.read_text() != text:
            parser.exit(1, f"{page} is not that of {arguments.results}: run python -m benchmarks.gpu.report\n")
        return
    page.write_text(text)
    from benchmarks.gpu.plots import draw

    draw(runs, arguments.docs / "images")


if __name__ == "__main__":
    main()
