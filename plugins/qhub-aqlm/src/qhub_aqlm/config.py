"""Which values of transformers' AqlmConfig this plugin offers."""

from __future__ import annotations

from typing import Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError

__all__ = ["check", "spec"]

# Wider codes would take codebooks of more than 65,536 vectors; none was ever published.
_WIDEST = 16
# 8 codebooks of 8 bits are the most that the paper tries; the bound keeps a hostile file from asking for huge tables.
_MOST_CODEBOOKS = 64


def spec() -> ConfigSpec:
    """Return the description of ``transformers.AqlmConfig``, taken as it is."""
    return ConfigSpec(cls="transformers:AqlmConfig", check=check, skip="linear_weights_not_to_quantize")


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on a value that no AQLM checkpoint can have."""
    for name, most in (
        ("in_group_size", None),
        ("out_group_size", None),
        ("num_codebooks", _MOST_CODEBOOKS),
        ("nbits_per_codebook", _WIDEST),
    ):
        value = getattr(config, name)
        if type(value) is not int or value < 1 or (most is not None and value > most):
            limit = f"from 1 to {most}" if most is not None else "of at least 1"
            raise ConfigError(f"{name}={value!r} of an aqlm config: it is a whole number {limit}")
    listed = config.linear_weights_not_to_quantize
    if listed is not None and not (isinstance(listed, (list, tuple)) and all(isinstance(one, str) for one in listed)):
        raise ConfigError(f"linear_weights_not_to_quantize={listed!r} of an aqlm config: it is a list of names")
