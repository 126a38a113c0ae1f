"""Options of commands that calibrate, and the quantizing of a folder that streams."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["Activations", "BatchSize", "Dataset", "Device", "Length", "Samples", "leads", "stream"]

_PANEL = "Calibration (methods that need data)"

Dataset = Annotated[
    str | None,
    typer.Option(
        help="Calibration data: a text file, a jsonl file (a string, a text or messages a line), or the name of a "
        "dataset. Without it the method's config decides; where that names none, the model writes its own text.",
        rich_help_panel=_PANEL,
    ),
]
Samples = Annotated[int | None, typer.Option(help="How many samples at most.", rich_help_panel=_PANEL)]
Length = Annotated[int | None, typer.Option("--length", help="Tokens of a sample at most.", rich_help_panel=_PANEL)]
BatchSize = Annotated[
    int | None, typer.Option(help="Samples that pass through a block together.", rich_help_panel=_PANEL)
]
Activations = Annotated[
    str | None,
    typer.Option(help="Where activations lie between blocks: device, cpu or disk.", rich_help_panel=_PANEL),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where blocks are computed; without it the accelerator if there is one.", rich_help_panel=_PANEL),
]


def stream(model: str, config: Any, out: Path, dtype: Any, options: dict[str, Any], overwrite: bool) -> Any:
    """Quantize ``model`` into ``out`` block by block; return what :func:`quantize_folder` returns.

    ``overwrite``: a stopped run of other settings is thrown away. An interruption says how to go on.
    """
    from qhub.cli.interruption import interruptible
    from qhub.cli.output import say
    from qhub.integrations.transformers.streaming import quantize_folder

    work = out.with_name(out.name + ".partial")
    if work.is_dir():
        say(f"going on with what {work} holds of an earlier run")
    try:
        with interruptible():
            return quantize_folder(model, config, out, dtype=dtype, options=options, anew=overwrite)
    except KeyboardInterrupt:
        say(f"interrupted: finished blocks are kept in {work}; the same command goes on from there")
        raise


def leads() -> bool:
    """Return whether this process is the first of those that calibrate together: the others have nothing to report."""
    from qhub.calibration import sharing

    return sharing.rank() == 0
