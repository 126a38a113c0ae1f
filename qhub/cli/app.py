"""The Typer application: the built-in commands, those that plugins add, and what errors look like.

Nothing here imports torch: ``qhub --help`` must be quick. Plugins are loaded for their commands only when the list of
commands is shown or a command is not built in, and then only those whose entry module mentions the hook at all.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qhub.cli.convert import convert
from qhub.cli.doctor import doctor
from qhub.cli.eval_ import evaluate
from qhub.cli.explain import explain
from qhub.cli.inspect_ import inspect
from qhub.cli.list_ import list_methods
from qhub.cli.merge import merge
from qhub.cli.new_plugin import new_plugin
from qhub.cli.output import fail, json_wanted, working
from qhub.cli.quantize import quantize
from qhub.cli.tune import tune
from qhub.errors import QhubError
from qhub.registry import KERNEL_GROUP, METHOD_GROUP, PluginInfo, registry

__all__ = ["app"]

_HOOK = "qhub_commands"


class _Commands(TyperGroup):
    """Is the group of all commands: adds those of plugins when they are asked for, and turns errors into one line."""

    _asked = False

    def list_commands(self, ctx: Any) -> list[str]:
        self._ask_plugins()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            self._ask_plugins()
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (QhubError, OSError, ImportError) as error:
            # What transformers raises besides: OSError for a model that is not there, as huggingface_hub and the disk
            # do; ImportError for a package that one of its own methods needs.
            if os.environ.get("QHUB_TRACEBACK", "0") not in ("", "0"):
                raise
            fail(str(error) or repr(error), json_wanted(ctx), type(error).__name__)
            raise typer.Exit(1) from error

    def _ask_plugins(self) -> None:
        if self._asked:
            return
        self._asked = True
        for group in (METHOD_GROUP, KERNEL_GROUP):
            for name, info in registry.list(group).items():
                if _mentions_commands(info):
                    self._add_from(name, group)

    def _add_from(self, name: str, group: str) -> None:
        own = typer.Typer()
        with working():
            for _ in registry.broadcast(_HOOK, groups=(group,), names=(name,), app=own):
                pass
            if not own.registered_commands and not own.registered_groups:
                return
            for command_name, command in typer.main.get_group(own).commands.items():
                if command_name in self.commands:
                    warnings.warn(
                        f"the plugin {name!r} brings a command {command_name!r}, a name that is taken: left out",
                        stacklevel=2,
                    )
                else:
                    self.commands[command_name] = command


def _mentions_commands(info: PluginInfo) -> bool:
    """Return whether the plugin's entry module may have the hook: its source names it, or cannot be read unimported."""
    module, _, inside = info.target.partition(":")
    if inside or not all(part.isidentifier() for part in module.split(".")):
        return True
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return True
    if spec is None or spec.origin is None:
        return True
    file = Path(spec.origin)
    for part in module.split(".")[1:]:
        parent = file.parent if file.name == "__init__.py" else file.with_suffix("")
        file = parent / part / "__init__.py" if (parent / part).is_dir() else parent / f"{part}.py"
    if file.suffix != ".py" or not file.is_file():
        return True
    return _HOOK.encode() in file.read_bytes()


app = typer.Typer(
    name="qhub",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    # A traceback is for defects, and then the whole of it is wanted.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from qhub import __version__

        print(f"qhub {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Quantize models with any method, look into the result and measure it.

    \b
    Start here:
      qhub list                                   which methods are installed
      qhub doctor                                 whether they can work here
      qhub quantize MODEL --method hqq --out DIR  a folder or a Hub model
      qhub inspect DIR                            what is in the result
      qhub eval DIR --base MODEL                  what it costs in quality
      qhub merge DIR ADAPTER --out OUT            an adapter into its weights
      qhub convert DIR --to METHOD --out OUT      another format, the same numbers

    Each command has its own help, such as qhub quantize --help.
    Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed
    or a negative finding, 2 wrong usage.
    """


app.command("list")(list_methods)
app.command("doctor")(doctor)
app.command("quantize")(quantize)
app.command("merge")(merge)
app.command("convert")(convert)
app.command("inspect")(inspect)
app.command("eval")(evaluate)
app.command("explain")(explain)
app.command("tune")(tune)
app.command("new-plugin")(new_plugin)
