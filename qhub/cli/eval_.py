"""``qhub eval``: perplexity, distance from the base model and speed, by the protocol of :mod:`qhub.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qhub.cli.loading import DeviceMap, Model, existing, load_model, load_tokenizer, parse_device_map, parse_dtype
from qhub.cli.output import Json, emit, plain, say, table, working

__all__ = ["evaluate"]

_PROMPT = 16


def evaluate(
    model: Model,
    base: Annotated[
        str | None, typer.Option(help="The unquantized model to compare with: folder or Hub name.", callback=existing)
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text file (UTF-8) to measure on. Repeatable.",
            exists=True,
            dir_okay=False,
            show_default="Python's own manual",
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of the text to read.")] = 24,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    characters: Annotated[
        int, typer.Option(min=1, help="How much of each text is tokenized, from its beginning.")
    ] = 150_000,
    dtype: Annotated[
        str, typer.Option(help="What both models compute in: float32, bfloat16, float16 or auto.")
    ] = "float32",
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only",
            help="Measure the dequantized weights in a plain model: no kernels, activations not quantized.",
        ),
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Time greedy decoding of 64 tokens, batch size 1.")
    ] = True,
    tokenizer: Annotated[
        str | None, typer.Option(help="Where the tokenizer is.", show_default="MODEL, else the base")
    ] = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Measure what quantizing costs: perplexity, KL divergence from the base model, agreement, speed.

    Each window is read on its own, without special tokens. Perplexity is
    exp(mean loss of the windows), with its standard error over them.
    KL(base||model) is in nats per position. Decoding is timed before
    --weights-only takes effect. The default text comes with the Python in
    use, so figures on it compare within one Python version only. Exit code
    1 when a perplexity is not finite.

    \b
    Examples:
      qhub eval ./llama-nf4 --text wiki.txt
      qhub eval ./llama-nf4 --base ./llama --text wiki.txt --text code.txt
      qhub eval ./llama-nf4 --base ./llama --weights-only --no-speed --json
    """
    wanted, places = parse_dtype(dtype), parse_device_map(device_map)
    with working():
        from qhub import evaluate as measure

        options = {"dtype": wanted, "device_map": places}
        texts = [(path.name, _read(path)) for path in text or []] or [_manual()]
        reader = load_tokenizer(*([tokenizer] if tokenizer else [model, *([base] if base else [])]))
        tokens = [
            (name, measure.windows_of(reader, content, count=windows, length=length, characters=characters))
            for name, content in texts
        ]
        say(f"loading {model}")
        measured = load_model(model, **options).eval()
        decoding = measure.decode_speed(measured, tokens[0][1][0, :_PROMPT]) if speed else None
        if weights_only and getattr(measured, "hf_quantizer", None) is not None:
            measured = measured.dequantize()
        other = load_model(base, **options).eval() if base else None
        rows = []
        for name, cut in tokens:
            if len(cut) < windows:
                say(f"warning: {name} fills only {len(cut)} of {windows} windows of {length} tokens")
            say(f"measuring on {name}: {len(cut)} windows")
            rows.append(_measure(name, measured, other, cut))
    data = {
        "model": model,
        "base": base,
        "protocol": {
            "windows": windows,
            "length": length,
            "characters": characters,
            "dtype": dtype,
            "weights_only": weights_only,
        },
        "texts": rows,
        "decode": None if decoding is None else {**plain(decoding), "tokens_per_second": decoding.tokens_per_second},
    }
    emit(as_json, data, *_shown(data))
    if any(plain(row["perplexity"]) is None for row in rows):
        raise typer.Exit(1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is not UTF-8: {error}", param_hint="--text") from error


def _manual() -> tuple[str, str]:
    """Return the text that every CPython brings: the language reference of its ``help()``."""
    from pydoc_data.topics import topics

    return "Python's manual", "\n".join(topics[name] for name in sorted(topics))


def _measure(name: str, model: Any, base: Any, tokens: Any) -> dict[str, Any]:
    from qhub.evaluate import compare, perplexity

    compared = None if base is None else compare(model, base, tokens)
    own = perplexity(model, tokens) if compared is None else compared.model
    row: dict[str, Any] = {
        "text": name,
        "windows": len(tokens),
        "perplexity": own.value,
        "standard_error": own.standard_error,
        "losses": own.losses,
        "tokens_per_second": own.tokens_per_second,
    }
    if compared is not None:
        row |= {
            "base_perplexity": compared.base.value,
            "difference": compared.difference,
            "difference_standard_error": compared.difference_error,
            "kl_mean": compared.kl_mean,
            "kl_median": compared.kl_median,
            "kl_p99": compared.kl_p99,
            "top1_agreement": compared.top1_agreement,
        }
    return row


def _shown(data: dict[str, Any]) -> list[Any]:
    columns = ["text", "windows", "perplexity", "tokens/s"]
    if data["base"]:
        columns[3:3] = ["base", "difference", "KL mean", "KL median", "KL p99", "top-1"]
    rows = []
    for row in data["texts"]:
        cells = [
            row["text"],
            row["windows"],
            _with_error(row["perplexity"], row["standard_error"]),
            f"{row['tokens_per_second']:.0f}",
        ]
        if data["base"]:
            cells[3:3] = [
                f"{row['base_perplexity']:.3f}",
                _with_error(row["difference"], row["difference_standard_error"], "+"),
                f"{row['kl_mean']:.4f}",
                f"{row['kl_median']:.4f}",
                f"{row['kl_p99']:.4f}",
                f"{100 * row['top1_agreement']:.2f} %",
            ]
        rows.append(cells)
    shown: list[Any] = [table("", columns, rows)]
    if data["decode"]:
        rate, runs = data["decode"]["tokens_per_second"], len(data["decode"]["seconds"])
        shown.append(f"decoding: {rate:.1f} tokens/s (greedy, batch 1, median of {runs})")
    return shown


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
