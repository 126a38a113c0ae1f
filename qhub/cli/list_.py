"""``qhub list``: which methods and kernel packages are installed. Imports no plugin unless asked what they can do."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata
from typing import Annotated, Any

import typer

from qhub.cli.output import Json, emit, table, working
from qhub.errors import QhubError
from qhub.registry import KERNEL_GROUP, METHOD_GROUP, PluginInfo, registry

__all__ = ["Abilities", "by_plugin", "list_methods", "served_by"]

_FOR_KERNELS = "kernels"
_PLUGIN = "the plugin"


@dataclass(frozen=True)
class Abilities:
    """Is what one plugin says of itself when it is loaded.

    ``quantizes``, ``loads``: whether it has the hooks for that. ``presets``: names for ``qhub quantize --preset``, the
    usual one first. ``served``: of :func:`served_by`. ``failure``: why it cannot be used; None when it can.
    """

    quantizes: bool = False
    loads: bool = False
    presets: list[str] = field(default_factory=list)
    served: str = ""
    failure: str | None = None


def list_methods(
    abilities: Annotated[
        bool,
        typer.Option(
            "--abilities", "-a", help="Load each plugin and show what it can do: slower, and finds broken ones."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the installed quantization methods and kernel packages.

    Reads package metadata only; no plugin is imported. With --abilities each
    one is, to show whether it quantizes or only loads, its presets, whether
    it replaces a method of transformers, and what is broken. Exit code 1
    when a plugin cannot be used.

    \b
    Examples:
      qhub list
      qhub list --abilities
      qhub list --json
    """
    with working():
        methods = registry.list(METHOD_GROUP)
        kernels = registry.list(KERNEL_GROUP)
        found = {name: abilities_of(name) for name in methods} if abilities else {}
        broken_kernels = _failures(kernels) if abilities else {}
    data: dict[str, Any] = {
        "methods": [_row(info) | (vars(found[name]) if abilities else {}) for name, info in methods.items()],
        _FOR_KERNELS: [_row(info) | {"failure": broken_kernels.get(name)} for name, info in kernels.items()],
        "disabled": sorted(registry.disabled()),
    }
    emit(as_json, data, *_shown(data, abilities))
    if any(row["clash"] or row.get("failure") for row in [*data["methods"], *data[_FOR_KERNELS]]):
        raise typer.Exit(1)


def abilities_of(name: str) -> Abilities:
    """Load the plugin ``name`` and return what it can do; one that fails has :attr:`Abilities.failure`."""
    try:
        spec = registry.call(name, "qhub_config")
        if spec is None:
            return Abilities(failure="it has no hook qhub_config, so it is no method")
        return Abilities(
            quantizes=registry.has(name, "qhub_quantize"),
            loads=registry.has(name, "qhub_format"),
            presets=list(spec.presets),
            served=served_by(name),
        )
    except QhubError as error:
        return Abilities(failure=str(error))


def served_by(name: str) -> str:
    """Say who serves the method ``name``: the plugin (in transformers' place or alone), transformers, or nobody."""
    from transformers.quantizers import auto

    from qhub.integrations.transformers import install
    from qhub.integrations.transformers.quantizer import PluginQuantizer

    install()
    served = [auto.AUTO_QUANTIZER_MAPPING.get(name + suffix) for suffix in ("", "_4bit", "_8bit")]
    classes = [cls for cls in served if isinstance(cls, type)]
    if not classes:
        return "nobody"
    if not all(issubclass(cls, PluginQuantizer) for cls in classes):
        return "transformers"
    return f"{_PLUGIN}, in transformers' place" if any(getattr(cls, "replaces", False) for cls in classes) else _PLUGIN


def by_plugin(name: str) -> bool:
    """Return whether a plugin serves the method ``name``, not transformers and not nobody."""
    return served_by(name).startswith(_PLUGIN)


def _failures(kernels: dict[str, PluginInfo]) -> dict[str, str]:
    failures = {}
    for name in kernels:
        try:
            registry.load(name, KERNEL_GROUP)
        except QhubError as error:
            failures[name] = str(error)
    return failures


def _row(info: PluginInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "package": info.distribution,
        "version": info.version,
        "summary": _summary(info.distribution),
        "clash": list(info.clash),
    }


def _summary(distribution: str) -> str:
    try:
        return metadata(distribution)["Summary"] or ""
    except PackageNotFoundError:
        # A plugin that a program registered has no package.
        return ""


def _shown(data: dict[str, Any], abilities: bool) -> list[Any]:
    columns = ["method", "package", "version", *(("can", "presets", "served by") if abilities else ("about",))]
    shown: list[Any] = [table("", columns, [_cells(row, abilities) for row in data["methods"]])]
    if not data["methods"]:
        shown = [
            "No quantization method is installed: pip install 'qhub-core[all]', or one, such as pip install qhub-hqq"
        ]
    if data[_FOR_KERNELS]:
        rows = [[row["name"], row["package"], row["version"], row["summary"]] for row in data[_FOR_KERNELS]]
        shown.append(table("", ["kernels", "package", "version", "about"], rows))
    if data["disabled"]:
        shown.append(f"turned off by QHUB_DISABLE: {', '.join(data['disabled'])}")
    for row in [*data["methods"], *data[_FOR_KERNELS]]:
        if row["clash"]:
            owners = " and ".join(sorted([row["package"], *row["clash"]]))
            shown.append(f"{row['name']} cannot be used: it is announced by {owners}; uninstall one of them")
        elif row.get("failure"):
            shown.append(f"{row['name']} cannot be used: {row['failure']}")
    return shown


def _cells(row: dict[str, Any], abilities: bool) -> list[str]:
    first = [row["name"], row["package"], row["version"]]
    if not abilities:
        return [*first, row["summary"]]
    if row["failure"]:
        return [*first, "nothing (see below)", "", ""]
    can = [word for word, able in (("quantize", row["quantizes"]), ("load", row["loads"])) if able]
    return [*first, ", ".join(can), ", ".join(row["presets"]), row["served"]]
