"""``qhub merge``: merges a PEFT adapter into a model, quantized or not, and saves the result."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from qhub.cli.calibration import Dataset
from qhub.cli.loading import DeviceMap, Model, check_target, load_config, load_tokenizer, parse_device_map
from qhub.cli.output import Json, emit, say, table, working
from qhub.errors import ConfigError

__all__ = ["merge"]


def merge(
    base: Model,
    adapter: Annotated[
        str, typer.Argument(help="The adapter: a folder or a repository that PEFT wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to save into.", show_default=False)],
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Save dense weights: exact, and as large as before quantizing.")
    ] = False,
    grid: Annotated[
        str | None,
        typer.Option(
            help="keep: the scales stay; refit: they are fitted anew; best: by measured output error.",
            show_default="as the method says",
        ),
    ] = None,
    dataset: Dataset = None,
    samples: Annotated[int | None, typer.Option(help="How many samples to measure on; 0: measure nothing.")] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens of a sample at most.")] = None,
    device_map: DeviceMap = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Save into a folder that holds files already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into a model and save it.

    The weights of a quantized model stay quantized. What the adapter adds
    is rounded onto their grid such that the layers' outputs stay right,
    measured on a little text: the model writes it, unless --dataset gives
    some. The report says how far the merged model's predictions are from
    those with the adapter on top. The unquantized model is never in memory
    as a whole.

    \b
    Examples:
      qhub merge ./llama-nf4 ./my-lora -o ./llama-mine
      qhub merge ./llama-gptq ./my-lora -o ./mine --dataset texts.jsonl
      qhub merge ./llama-gptq ./my-lora -o ./mine-bf16 --dequantize
    """
    check_target(base, out, overwrite)
    given = {"grid": grid, "data": dataset, "samples": samples, "length": length}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    from qhub.merging import MergeOptions

    try:
        MergeOptions(**options)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    with working():
        from qhub.integrations.peft.merging import merge_folder

        if dataset is not None:
            options["tokenizer"] = load_tokenizer(base)
        load_config(base)
        say(f"merging {adapter} into {base}")
        report = merge_folder(
            base,
            adapter,
            out,
            dequantize=dequantize,
            overwrite=overwrite,
            device_map=parse_device_map(device_map),
            **options,
        )
    shown: list[Any] = []
    if report.layers:
        counts = Counter((layer.grid, layer.spread) for layer in report.layers)
        rows = [
            [grid, "yes" if spread else "no", str(count), *_errors(report.layers, grid, spread)]
            for (grid, spread), count in sorted(counts.items())
        ]
        shown.append(table("", ["grid", "errors spread", "weights", "update", "lost of it"], rows))
    emit(as_json, {"base": base, "adapter": adapter, "out": out, **report.as_data()}, *shown, report.summary())


def _errors(layers: Any, grid: str, spread: bool) -> list[str]:
    """Return the mean size of the update and what part of it was rounded away, over weights merged alike."""
    same = [layer for layer in layers if (layer.grid, layer.spread) == (grid, spread)]
    update = sum(layer.update for layer in same) / len(same)
    error = sum(layer.error for layer in same) / len(same)
    return [f"{100 * update:.2f} %", f"{100 * error / update:.0f} %" if update else "none"]
