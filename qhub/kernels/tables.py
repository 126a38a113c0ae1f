"""Tables of measured times: those shipped in ``cards/`` and the user's own, one file a card.

A file is JSON::

    {"format": 1, "card": {"name": ..., "bandwidth": ..., "rates": {...}}, "rows": [1, 2, 4, ...],
     "kernels": {"NAME:VERSION": {"packages": {"triton": "3.6.0"}, "configs": {"wide": {...}}}},
     "times": {"SIGNATURE": {"4096x4096 bfloat16": {"NAME:VERSION": [6.8, [7.1, "wide"], null, ...]}}}}

Times are in microseconds, one entry for each of ``rows`` (M), null where nothing was measured, with the name of a
config where one beat the kernel's own choice.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from qhub.errors import KernelError
from qhub.kernels.hardware import Card
from qhub.kernels.spec import KernelSpec

__all__ = ["BUCKETS", "Entry", "Shape", "Table", "load", "packages_of", "shipped_file", "user_file"]

# The M that are measured; a choice for M is that for the next of these.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_FORMAT = 1
_UNITS = ("half", "byte", "vector")


class Shape(NamedTuple):
    """Is the key of a measurement within one signature: N, K and the name of the input's dtype."""

    n: int
    k: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.n}x{self.k} {self.dtype}"


class Entry(NamedTuple):
    """Is one measured time: seconds, and the name of the config, None for the kernel's own choice."""

    seconds: float
    config: str | None = None


@dataclass
class Table:
    """Holds the measurements on one card.

    ``times``: {signature: {shape: {kernel key: {M: entry}}}}. ``configs``: {kernel key: {name: config}}. ``packages``:
    {kernel key: {package: version measured with}}.
    """

    card: Card
    times: dict[str, dict[Shape, dict[str, dict[int, Entry]]]] = field(default_factory=dict)
    configs: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    packages: dict[str, dict[str, str]] = field(default_factory=dict)

    def shapes(self, signature: str) -> dict[Shape, dict[str, dict[int, Entry]]]:
        """Return what was measured for layouts of ``signature``."""
        return self.times.get(signature, {})

    def put(self, signature: str, shape: Shape, key: str, times: dict[int, Entry]) -> None:
        """Add what is known of a kernel on one shape; other numbers of rows stay."""
        kernels = self.times.setdefault(signature, {}).setdefault(shape, {})
        kernels[key] = {**kernels.get(key, {}), **times}

    def drop(self, key: str) -> None:
        """Forget a kernel."""
        for shapes in self.times.values():
            for kernels in shapes.values():
                kernels.pop(key, None)
        self.configs.pop(key, None)
        self.packages.pop(key, None)

    def to_json(self) -> str:
        """Return the file's text: one line for each kernel on each shape."""
        rows = sorted(
            {m for shapes in self.times.values() for kernels in shapes.values() for t in kernels.values() for m in t}
        )
        lines = []
        for signature, shapes in sorted(self.times.items()):
            inner = []
            for shape, kernels in sorted(shapes.items()):
                one = [f"   {json.dumps(key)}: {json.dumps(_row(t, rows))}" for key, t in sorted(kernels.items())]
                inner.append(f"  {json.dumps(str(shape))}: {{\n" + ",\n".join(one) + "}")
            lines.append(f" {json.dumps(signature)}: {{\n" + ",\n".join(inner) + "}")
        card = {"name": self.card.name, "bandwidth": round(self.card.bandwidth), "rates": _rounded(self.card.rates)}
        known = {
            key: {"packages": self.packages.get(key, {}), "configs": self.configs.get(key, {})}
            for key in sorted({key for shapes in self.times.values() for kernels in shapes.values() for key in kernels})
        }
        head = [f'"format": {_FORMAT}', f'"card": {json.dumps(card)}', f'"rows": {json.dumps(rows)}']
        body = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in known.items())
        return "{" + ",\n".join([*head, f'"kernels": {{\n{body}}}', '"times": {\n' + ",\n".join(lines) + "}"]) + "}\n"

    def write(self, path: Path) -> None:
        """Write the table: beside the target first, then renamed over it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
            # The temporary file is private; a table is as readable as any file of a package.
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @staticmethod
    def read(path: Path) -> Table:
        """Return the table in the file; raises :class:`KernelError` that says what is wrong with it."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise KernelError(f"{path}: measurements of format {data['format']}, this qhub reads {_FORMAT}")
            rows = [_whole(m) for m in data["rows"]]
            rates = {unit: _positive(data["card"]["rates"][unit]) for unit in _UNITS}
            card = Card(str(data["card"]["name"]), _positive(data["card"]["bandwidth"]), rates, measured=True)
            table = Table(card)
            for key, said in data["kernels"].items():
                table.packages[key] = {str(name): str(version) for name, version in said["packages"].items()}
                table.configs[key] = {str(name): dict(config) for name, config in said["configs"].items()}
            for signature, shapes in data["times"].items():
                for text, kernels in shapes.items():
                    for key, times in kernels.items():
                        entries = _entries(rows, times, table.configs[key])
                        table.put(signature, _shape(text), key, entries)
        except KernelError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise KernelError(
                f"{path}: no table of measured kernels ({type(error).__name__}: {error}); delete it, or measure again "
                "(qhub tune)"
            ) from error
        return table


def packages_of(spec: KernelSpec) -> dict[str, str]:
    """Return the versions that the spec's measurements depend on."""
    return {name: _version(name) for name in spec.packages}


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "none"


def user_file(card: str) -> Path:
    """Return where the user's measurements on ``card`` are: in ``$QHUB_CACHE``, else the platform's cache folder."""
    return _cache_folder() / "kernels" / f"{_slug(card)}.json"


def shipped_file(card: str) -> Path:
    """Return where measurements on ``card`` that come with qhub would be."""
    return Path(__file__).with_name("cards") / f"{_slug(card)}.json"


def load(path: Path) -> Table | None:
    """Return the table in ``path``; None where there is no file, or, with a warning, none that can be used."""
    if not path.is_file():
        return None
    try:
        return Table.read(path)
    except KernelError as error:
        warnings.warn(f"measured kernel times are left out: {error}", RuntimeWarning, stacklevel=3)
        return None


def _cache_folder() -> Path:
    own = os.environ.get("QHUB_CACHE")
    if own:
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "qhub"


def _slug(name: str) -> str:
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    # Names of one slug are told apart.
    return short if len(short) <= 60 else f"{short[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _row(times: dict[int, Entry], rows: Iterable[int]) -> list[Any]:
    row: list[Any] = []
    for m in rows:
        entry = times.get(m)
        if entry is None:
            row.append(None)
        else:
            us = float(f"{entry.seconds * 1e6:.4g}")
            row.append(us if entry.config is None else [us, entry.config])
    return row


def _rounded(rates: dict[str, float]) -> dict[str, float]:
    return {unit: float(f"{rate:.4g}") for unit, rate in rates.items()}


def _entries(rows: list[int], times: list[Any], configs: dict[str, Any]) -> dict[int, Entry]:
    entries = {}
    for m, value in zip(rows, times, strict=True):
        if value is None:
            continue
        us, config = value if isinstance(value, list) else (value, None)
        if config is not None and config not in configs:
            raise ValueError(f"a time names the config {config!r}, which is not described")
        entries[m] = Entry(_positive(us) * 1e-6, config)
    return entries


def _shape(text: str) -> Shape:
    found = re.fullmatch(r"(\d+)x(\d+) (\w+)", text)
    if found is None:
        raise ValueError(f"{text!r} is no shape")
    return Shape(int(found[1]), int(found[2]), found[3])


def _whole(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no number of rows")
    return value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is no positive number")
    return float(value)
