"""What commands print: results as tables or as JSON on stdout, progress and warnings on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["Json", "emit", "fail", "json_wanted", "plain", "say", "size", "table", "working"]

_WANTED = "qhub.json"
# Wide enough that a file or a pipe gets each row on few lines.
_PIPE_WIDTH = 160


def _remember(context: typer.Context, value: bool) -> bool:
    context.meta[_WANTED] = value
    return value


Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.", callback=_remember),
]


def json_wanted(context: Any) -> bool:
    """Return whether the command that runs in ``context`` was given ``--json``."""
    return bool(context.meta.get(_WANTED, False))


def emit(as_json: bool, data: Any, *shown: Any) -> None:
    """Print a result on stdout: ``data`` as JSON, or ``shown`` (text, :func:`table`) for people."""
    if as_json:
        print(json.dumps(plain(data), indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    for one in shown:
        # Module names hold brackets and colons that rich would take for markup.
        console.print(one, markup=False, highlight=False, soft_wrap=isinstance(one, str))


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def fail(message: str, as_json: bool, kind: str) -> None:
    """Report an error: one line on stderr; with JSON also ``{"error": ...}`` on stdout."""
    line = " ".join(message.split())
    say(f"error: {line}")
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": line}}, indent=2))


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Send what libraries print to stderr, and warnings there too as one line each."""

    def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        say(f"warning: {' '.join(str(message).split())}")

    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = show
        yield


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """Return a table whose cells are folded, never cut."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*(Text(str(cell)) for cell in row))
    return result


def size(count: float) -> str:
    """Return ``count`` bytes in words: ``12.3 MB`` (10^6)."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{count:.0f} bytes"


def plain(value: Any) -> Any:
    """Return ``value`` as JSON's data: dataclasses as objects, NaN and infinity as null, what is left as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(one) for one in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    # torch.float32 is "float32" in configs everywhere.
    return str(value).removeprefix("torch.")
