"""``qhub tune``: measures every kernel for the layers of a model, and remembers the fastest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qhub.cli.loading import DeviceMap, Dtype, Model, load_model, parse_device_map, parse_dtype
from qhub.cli.output import Json, emit, working

__all__ = ["tune"]


def _rows(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        rows = sorted({int(one) for one in text.split(",")})
    except ValueError:
        rows = []
    if not rows or rows[0] < 1:
        raise typer.BadParameter(f"{text!r} is no list of numbers of rows, such as 1,8,64", param_hint="--rows")
    return rows


def tune(
    model: Model,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Short for a --device-map of one device: cpu, cuda, cuda:1.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option("--rows", help="Numbers of input rows (M) to measure.", show_default="1,2,4,8,...,4096"),
    ] = None,
    bridges: Annotated[
        bool,
        typer.Option("--bridges", help="Measure kernels too that keep a second copy of each weight in memory."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write.", show_default="in the cache folder")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure every kernel for the layers of a model, and remember the fastest.

    Each kind and size of quantized layer is multiplied by every kernel that
    can, for several numbers of input rows. What was fastest is taken from
    then on, for all models with such layers, on this machine and card. The
    times lie in $QHUB_CACHE, or in qhub's folder in the platform's cache.

    \b
    Examples:
      qhub tune ./model-int4 --device cuda
      qhub tune ./model-int4 --rows 1,16,256
      qhub tune ./model-nf4 --bridges --device cuda
    """
    if device is not None and device_map is not None:
        raise typer.BadParameter("--device and --device-map say the same thing: give one of them")
    wanted, places = parse_dtype(dtype), parse_device_map(device_map)
    if device is not None:
        places = {"": device}
    numbers = _rows(rows)
    with working():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from qhub.kernels.tables import BUCKETS
        from qhub.kernels.tune import tune as tune_model

        loaded = load_model(model, dtype=wanted, device_map=places)
        columns: list[Any] = [BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()]
        columns.append(TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=Console(file=sys.stderr)) as bar:
            shown = bar.add_task("")

            def progress(done: int, total: int, now: str) -> None:
                bar.update(shown, completed=done, total=total, description=now)

            found = tune_model(loaded, rows=numbers or BUCKETS, bridges=bridges, progress=progress, path=out)
    emit(as_json, found.to_dict(), str(found))
