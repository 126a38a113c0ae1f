"""Which weight gets which settings: by name, as FqnToConfig says, or the same for all linear layers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts import Activation, Layout
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_torchao.reading import ANY, settings_by_name
from qhub_torchao.settings import Settings

__all__ = ["plan", "settings_named"]


def plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight, or why it stays as it is.

    Raises :class:`ConfigError` when the settings fit none of the weights, or when two of them would lay weights out
    alike and mean different numbers.
    """
    by_name = settings_by_name(config)
    plans: dict[str, LayerPlan | Skip] = {}
    known: dict[Layout, tuple[str, Settings]] = {}
    misfits = []
    for weight in weights:
        settings = settings_named(weight, by_name, config.include_input_output_embeddings)
        if isinstance(settings, Skip):
            plans[weight.name] = settings
            continue
        reason = settings.misfit(weight.out_features, weight.in_features)
        if reason is not None:
            misfits.append(f"{weight.name}: {reason}")
            plans[weight.name] = Skip(reason)
            continue
        layout = settings.layout(weight.out_features, weight.in_features)
        if weight.kind == "embedding":
            # A table is looked up: there is no input to round.
            layout = dataclasses.replace(layout, activation=Activation())
        other, first = known.setdefault(layout, (weight.module, settings))
        if _numbers(first) != _numbers(settings):
            raise ConfigError(
                f"{other} and {weight.module} would be laid out alike and quantized differently ({first} and "
                f"{settings}): give both the same config"
            )
        plans[weight.name] = LayerPlan(layout)
    if misfits and not any(isinstance(one, LayerPlan) for one in plans.values()):
        raise ConfigError(f"this torchao config fits none of the weights: {misfits[0]}")
    return plans


def _numbers(settings: Settings) -> Settings:
    """Return what tells settings apart that have the same layout."""
    return dataclasses.replace(settings, grain=dataclasses.replace(settings.grain, kind="tensor", sizes=()))


def settings_named(weight: WeightInfo, by_name: Mapping[str, Settings | None], tables: bool) -> Settings | Skip:
    """Return the settings of ``weight``, or why there are none; ``tables``: what is not named goes for embeddings too.

    The parameter's name wins over the module's, both over patterns (``"re:..."``, the first that matches), and these
    over ``"_default"``. Source: transformers 5.23, ``TorchAoQuantize.convert`` (integrations/torchao.py).
    """
    if weight.kind == "conv1d":
        return Skip("torchao quantizes torch's linear layers, this one is transposed")
    key = _key(weight, by_name)
    if weight.kind == "experts" and key in (None, ANY, "_default"):
        return Skip("torchao quantizes linear layers, and fused experts where FqnToConfig names their parameter")
    if key is None:
        return Skip("no name of FqnToConfig fits it")
    if weight.kind == "embedding" and key == "_default" and not tables:
        return Skip("'_default' of FqnToConfig is for linear layers: set include_input_output_embeddings or name it")
    settings = by_name[key]
    if settings is None:
        return Skip(f"{key!r} is None in FqnToConfig")
    if weight.kind == "experts" and (
        weight.transposed or settings.storage not in ("int8", "float8") or settings.grain.kind == "tensor"
    ):
        return Skip("fused experts are held as int8 or float8 with scales along the last dimension of (out, in)")
    return settings


def _key(weight: WeightInfo, by_name: Mapping[str, Settings | None]) -> str | None:
    # The module that holds fused experts is named before their parameter's dot.
    module = weight.name.rpartition(".")[0]
    for name in (weight.name, module, ANY):
        if name in by_name:
            return name
    for name in by_name:
        if not name.startswith("re:"):
            continue
        try:
            hit = any(re.fullmatch(name[3:], one) for one in (weight.name, module))
        except re.error as error:
            raise ConfigError(f"{name!r} in FqnToConfig is no regular expression: {error}") from error
        if hit:
            return name
    return "_default" if "_default" in by_name else None
