"""Which values of transformers' EetqConfig this plugin offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError

__all__ = ["check", "from_options", "spec"]


def spec() -> ConfigSpec:
    """Return the description of ``transformers.EetqConfig``, taken as it is."""
    return ConfigSpec(
        cls="transformers:EetqConfig",
        check=check,
        skip="modules_to_not_convert",
        presets={"int8": {"weights": "int8"}},
        from_options=from_options,
    )


def from_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return config values for command-line ``options``: ``bits`` is 8; other keys are the config's own.

    Raises :class:`ConfigError` for another width, and for a ``group_size``: a scale is a whole row's.
    """
    values = dict(options)
    bits, group_size = values.pop("bits", None), values.pop("group_size", None)
    if bits not in (None, 8):
        raise ConfigError(f"bits={bits}: eetq stores 8 bits")
    if group_size not in (None, -1):
        raise ConfigError(f"group_size={group_size}: eetq has one scale for each output channel, leave it out")
    return values


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on a value that no EETQ checkpoint can have."""
    if config.weights != "int8":
        raise ConfigError(f"weights={config.weights!r} of an eetq config: EETQ stores 'int8'")
    listed = config.modules_to_not_convert
    if listed is not None and not (isinstance(listed, (list, tuple)) and all(isinstance(one, str) for one in listed)):
        raise ConfigError(f"modules_to_not_convert={listed!r} of an eetq config: it is a list of names")
