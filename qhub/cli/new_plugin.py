"""``qhub new-plugin``: writes a package with a complete, tested method, to start one's own from."""

from __future__ import annotations

import re
import shutil
import tempfile
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from qhub.cli.output import Json, emit
from qhub.errors import PluginError
from qhub.registry import registry

__all__ = ["new_plugin", "write_plugin"]

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# qhub-core is qhub itself.
_TAKEN = frozenset({"core"})
_SUFFIX = ".tmpl"


def new_plugin(
    name: Annotated[str, typer.Argument(help="The method's name: what stands as quant_method in config.json.")],
    folder: Annotated[Path, typer.Option("--dir", "-d", help="Where to make the folder qhub-NAME.")] = Path(),
    as_json: Json = False,
) -> None:
    """Write a package with a quantization method of your own.

    The package works as it is: it rounds weights to the nearest of evenly
    spaced values, and its tests, the conformance kit, pass. Put your
    algorithm into method.py and run them again.

    \b
    Examples:
      qhub new-plugin mymethod
      cd qhub-mymethod
      pip install -e ".\\[test]"
      pytest
    """
    try:
        target = write_plugin(name, folder)
    except PluginError as error:
        raise typer.BadParameter(str(error)) from error
    written = sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())
    lines = [f"wrote {target}", *(f"  {file}" for file in written)]
    lines += ["", "next:", f"  cd {target}", '  pip install -e ".[test]"', "  pytest"]
    emit(as_json, {"name": name, "folder": target, "files": written}, "\n".join(lines))


def write_plugin(name: str, parent: Path) -> Path:
    """Write the package of the method ``name`` into a new folder in ``parent``, and return that folder.

    The folder appears complete or not at all. Raises :class:`PluginError` for a name that cannot be one or that an
    installed plugin has, and for a folder that exists.
    """
    if not _NAME.fullmatch(name):
        raise PluginError(
            f"{name!r} cannot be a method's name: it takes lower-case letters, digits and single underscores between "
            "them, and begins with a letter (my_method)"
        )
    if name in _TAKEN:
        raise PluginError(f"{name!r} cannot be a method's name: the package qhub-{name} is part of qhub itself")
    installed = registry.list().get(name)
    if installed is not None:
        raise PluginError(
            f"the method {name!r} is served by the installed package {installed.distribution}: two packages cannot "
            "share a name, choose another one"
        )
    distribution = f"qhub-{name.replace('_', '-')}"
    target = parent / distribution
    if target.exists():
        raise PluginError(f"{target} exists already: choose another name or --dir, or remove it")
    words = {
        "name": name,
        "module": f"qhub_{name}",
        "class": "".join(word.capitalize() for word in name.split("_")),
        "distribution": distribution,
    }
    parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{distribution}-", dir=parent))
    try:
        _fill(files("qhub.cli") / "template", staging, words)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _fill(source: Traversable, target: Path, words: dict[str, str]) -> None:
    """Copy the template ``source`` into the folder ``target``, every ``{{word}}`` replaced."""
    for entry in source.iterdir():
        if entry.is_dir():
            place = target / (words["module"] if entry.name == "package" else entry.name)
            place.mkdir()
            _fill(entry, place, words)
        elif entry.name.endswith(_SUFFIX):
            text = entry.read_text(encoding="utf-8")
            for word, value in words.items():
                text = text.replace("{{" + word + "}}", value)
            (target / entry.name.removesuffix(_SUFFIX)).write_text(text, encoding="utf-8")
