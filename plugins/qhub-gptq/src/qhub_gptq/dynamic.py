"""gptqmodel's ``dynamic``: settings by module, as ``{"+:regex": {"bits": 8}, "-:regex": {}}``.

Source: gptqmodel 7.7, ``_resolve_dynamic_override`` and ``BaseQuantizeConfig.__post_init__``
(gptqmodel/quantization/config.py). A pattern matches from the start of a module's name. ``-:`` leaves modules out and
goes first, whatever the order in the file; of the others (``+:`` or no mark) the first that matches holds, and what it
does not say is as in the config itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qhub.errors import ConfigError

__all__ = ["BITS", "Rule", "Settings", "rules_of", "settings_of"]

BITS = (2, 3, 4, 8)

# AutoRound notes layers that it left alone with their width.
_DENSE_BITS = (16, 32)

# What only steered the quantizing; a reader has no use for it.
_IGNORED = frozenset(
    {
        "act_bits", "act_data_type", "act_dynamic", "act_group_aware", "act_group_size", "act_sym",
        "damp_auto_increment", "damp_percent", "fallback", "fixed_by_user", "foem", "gptaq", "hessian", "mse",
        "scale_dtype", "smooth", "smoother", "static_groups", "super_bits", "super_group_size", "true_sequential",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Says how one layer is stored. ``group_size``: -1 for whole rows."""

    bits: int
    group_size: int
    desc_act: bool
    sym: bool


@dataclass(frozen=True)
class Rule:
    """Is one entry of ``dynamic``: ``overrides`` for the modules that ``pattern`` matches, None to leave them out.

    ``key``: as the config has it.
    """

    key: str
    pattern: re.Pattern[str]
    overrides: Mapping[str, Any] | None


def rules_of(config: Any) -> Sequence[Rule]:
    """Return the rules of ``config.dynamic`` in the order they hold; none when there is no such key.

    Raises :class:`ConfigError` on an invalid pattern, an unknown key or an impossible value.
    """
    dynamic = getattr(config, "dynamic", None)
    if dynamic is None:
        return []
    if not isinstance(dynamic, Mapping):
        raise ConfigError(f"dynamic={dynamic!r} of a gptq config: it is a dictionary from patterns to settings")
    rules = [_rule(key, values) for key, values in dynamic.items()]
    return sorted(rules, key=lambda rule: rule.overrides is not None)


def settings_of(config: Any, rules: Sequence[Rule], module: str) -> Settings | Rule:
    """Return the settings of ``module``, or the rule of ``rules`` that leaves it out."""
    base = {"bits": config.bits, "group_size": config.group_size, "desc_act": config.desc_act, "sym": config.sym}
    for rule in rules:
        if rule.pattern.match(module):
            if rule.overrides is None:
                return rule
            base |= rule.overrides
            break
    return Settings(**base)


def _rule(key: str, values: Any) -> Rule:
    named = f"dynamic of a gptq config, entry {key!r}"
    if not isinstance(key, str) or not (values is None or isinstance(values, Mapping)):
        raise ConfigError(f"{named}: it is a pattern with a dictionary of settings, found {values!r}")
    source = key[2:] if key.startswith(("+:", "-:")) else key
    try:
        pattern = re.compile(source)
    except re.error as error:
        raise ConfigError(f"{named}: {source!r} is no regular expression: {error}") from error
    if key.startswith("-:"):
        return Rule(key, pattern, None)
    given = {name: value for name, value in (values or {}).items() if value is not None and name not in _IGNORED}
    if given.pop("data_type", "int") != "int" or given.pop("adapter", None):
        raise ConfigError(f"{named}: this plugin reads integers without adapters, found {values!r}")
    unknown = sorted(set(given) - {"bits", "group_size", "desc_act", "sym"})
    if unknown:
        raise ConfigError(f"{named}: unknown keys {unknown}; correct the spelling, or update the plugin")
    bits, group = given.get("bits", 4), given.get("group_size", -1)
    if type(bits) is int and bits in _DENSE_BITS:
        return Rule(key, pattern, None)
    if type(bits) is not int or bits not in BITS:
        raise ConfigError(f"{named}: bits={bits!r}, it is one of {BITS}")
    if type(group) is not int or (group != -1 and group < 1):
        raise ConfigError(f"{named}: group_size={group!r}, it is at least 1, or -1 for whole rows")
    for name in ("desc_act", "sym"):
        if not isinstance(given.get(name, True), bool):
            raise ConfigError(f"{named}: {name}={given[name]!r}, it is true or false")
    return Rule(key, pattern, given)
