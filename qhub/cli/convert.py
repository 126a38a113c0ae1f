"""``qhub convert``: a quantized model in another method's format, without changing a number where that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qhub.cli.calibration import Dataset
from qhub.cli.loading import check_target
from qhub.cli.output import Json, emit, say, table, working
from qhub.cli.quantize import settings_of
from qhub.errors import ConfigError

__all__ = ["convert"]


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A folder, a repository of the Hub, or a GGUF file.", show_default=False),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="An installed method, or dense for weights that are not quantized.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to save into.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the target's config. Repeatable."),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Quantize anew where the target cannot hold the numbers, and measure that."),
    ] = False,
    dataset: Dataset = None,
    samples: Annotated[int, typer.Option(help="How many texts a loss is measured on.")] = 8,
    max_shard_size: Annotated[str, typer.Option(help="The size from which a new weight file is begun.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Save into a folder that holds files already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a quantized model in another method's format.

    Codes, scales and zeros stay the numbers they are, and every weight is
    compared. Where the target cannot hold them the command says why and
    writes nothing; with --requantize the model is quantized anew, and the
    report says how far its predictions are from the source's. One matrix is
    in memory at a time.

    \b
    Examples:
      qhub convert ./llama-gptq --to compressed-tensors -o ./llama-vllm
      qhub convert ./llama-gptq --to gguf -o ./llama-gguf
      qhub convert ./llama.Q4_0.gguf --to gptq -o ./llama-gptq
      qhub convert ./llama-nf4 --to gptq --requantize -o ./llama-gptq
      qhub convert ./llama-awq --to dense -o ./llama-bf16
    """
    check_target(source, out, overwrite)
    options = settings_of(settings or [])
    with working():
        from qhub.integrations.transformers import install

        # Before the quantizer's module is imported: see streaming.py.
        install()
        from qhub.integrations.transformers.converting import convert as run

        say(f"converting {source} to {to}")
        try:
            report = run(
                source,
                to,
                out,
                options=options,
                requantize=requantize,
                max_shard_size=max_shard_size,
                data=dataset,
                samples=samples,
            )
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from error
    rows = [[name or "all", reason] for name, reason in list(report.losses.items())[:10]]
    shown: list[Any] = [table("", ["quantized anew", "because"], rows)] if rows else []
    emit(as_json, {"source_path": source, "out": out, **report.as_data()}, *shown, report.summary(), *report.notes)
