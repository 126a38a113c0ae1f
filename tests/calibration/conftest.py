"""A method that calibrates, kept simple and watched: it notes its statistics, and rounds to the nearest code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from qhub import ConfigSpec, MethodConfig, hookimpl
from qhub.calibration import CalibrationOptions
from qhub.formats import Entry, Format
from qhub.layouts import Affine, Grid, Transform
from qhub.plan import LayerPlan
from qhub.registry import registry


@dataclass
class WatchedConfig(MethodConfig):
    """``equalize``: choose input scales from the statistics; ``statistics``: what to ask for."""

    quant_method: ClassVar[str] = "watched"
    bits: int = 8
    equalize: bool = False
    statistics: tuple[str, ...] = ("hessian", "mean_abs")
    together: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        # Samples are of no use to whoever loads the result.
        return {**super().to_dict(), "options": {}}


class WatchedFormat(Format):
    """Writes the parts under their own names."""

    markers = frozenset({"qweight"})
    names = frozenset({"qweight", "scales", "in_scale"})

    def entries(self, layout: Any) -> Any:
        entries = {name: Entry(spec.shape, spec.dtypes) for name, spec in layout.part_specs().items()}
        entries.setdefault("in_scale", Entry((layout.in_features,), (torch.float32,), required=False))
        return entries

    def pack(self, layout: Any, parts: Any, dtype: Any) -> Any:
        return dict(parts)

    def unpack(self, layout: Any, entries: Any) -> Any:
        import dataclasses

        if "in_scale" in entries:
            layout = dataclasses.replace(layout, transforms=(Transform("scale", "in"),))
        return layout, dict(entries)


class Watched:
    """The plugin. ``seen``: (weight, layout, statistics) of every call; ``tied``: of every equalization."""

    config = WatchedConfig

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, Any, dict[str, torch.Tensor]]] = []
        self.tied: list[Any] = []
        self.groups: list[list[str]] = []

    @hookimpl
    def qhub_config(self) -> ConfigSpec:
        return ConfigSpec(cls=WatchedConfig, skip="modules_to_not_convert")

    @hookimpl
    def qhub_plan(self, config: Any, weights: Any) -> Any:
        return {
            w.name: LayerPlan(
                Affine(
                    out_features=w.out_features,
                    in_features=w.in_features,
                    bits=config.bits,
                    grid=Grid.along_k(w.in_features),
                    zero_point=float(2 ** (config.bits - 1)),
                ),
                statistics=tuple(config.statistics),
                rows_independent=config.together,
            )
            for w in weights
        }

    @hookimpl
    def qhub_calibration(self, config: Any) -> CalibrationOptions:
        return CalibrationOptions(**config.options)

    @hookimpl
    def qhub_quantize(self, config: Any, weight: Any, layout: Any, statistics: Any) -> Any:
        self.seen.append((weight.clone(), layout, dict(statistics)))
        empty = {n: torch.zeros(s.shape, dtype=s.dtypes[0]) for n, s in layout.part_specs().items()}
        return layout.encode(weight.float(), empty, grid="refit")

    @hookimpl
    def qhub_equalize(self, config: Any, weights: Any, layouts: Any, statistics: Any, tied: Any) -> Any:
        if not config.equalize:
            return None
        self.groups.append(list(weights))
        self.tied.append(tied)
        scales = statistics["mean_abs"].clamp_min(1e-3).sqrt()
        if tied is not None:
            mean = torch.zeros(int(tied.max()) + 1).scatter_reduce(0, tied, scales, "mean", include_self=False)
            scales = mean[tied]
        return scales / (scales.max() * scales.min()).sqrt()

    @hookimpl
    def qhub_format(self, config: Any) -> Format:
        return WatchedFormat()


@pytest.fixture
def watched() -> Iterator[Watched]:
    from qhub.integrations.transformers import install

    plugin = Watched()
    registry.register(plugin, "watched")
    install()
    yield plugin
    registry.unregister("watched")


@pytest.fixture
def tokens() -> Any:
    """A function that returns ``count`` samples of random tokens below 128."""

    def make(count: int = 6, length: int = 24, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 128, (count, length), generator=generator).tolist()

    return make
