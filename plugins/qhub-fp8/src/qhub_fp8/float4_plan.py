"""What the two 4-bit methods share: which layers they take, and what their configs may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError
from qhub.layouts import Layout
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_fp8.config import check_names

__all__ = ["plan", "spec"]


def spec(method: str, cls: str) -> ConfigSpec:
    """Return the description of the config class ``cls`` of ``method``, which holds a list of modules to leave."""

    def check(config: Any) -> None:
        check_names(method, "modules_to_not_convert", config.modules_to_not_convert)

    def from_options(options: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(options)
        if values.pop("bits", 4) != 4:
            raise ConfigError(f"bits={options['bits']} of a config of {method}: its floats have 4")
        return values

    return ConfigSpec(
        cls=cls,
        keys=frozenset({"quant_method", "modules_to_not_convert", "dequantize"}),
        check=check,
        skip="modules_to_not_convert",
        presets={"4bit": {}},
        from_options=from_options,
    )


def plan(
    method: str, weights: Sequence[WeightInfo], group: int, layout: Callable[[int, int], Layout]
) -> Mapping[str, LayerPlan | Skip]:
    """Return ``layout(out_features, in_features)`` of each weight, or why it stays as it is."""
    plans: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        if weight.kind == "embedding":
            plans[weight.name] = Skip(f"{method} quantizes linear layers")
        elif weight.in_features % group:
            plans[weight.name] = Skip(
                f"its {weight.in_features} input features are no multiple of {group}, which files hold together"
            )
        else:
            plans[weight.name] = LayerPlan(layout(weight.out_features, weight.in_features))
    if plans and not any(isinstance(one, LayerPlan) for one in plans.values()):
        first = next(f"{name}: {one.reason}" for name, one in plans.items() if isinstance(one, Skip))
        raise ConfigError(f"{method} fits none of the weights: {first}")
    return plans
