"""GGUF for qhub: blocks of llama.cpp's files stay packed, and any model is written as such a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qhub import ConfigSpec, hookimpl
from qhub.formats import Container, Format
from qhub.kernels import KernelSpec
from qhub.layouts import Layout
from qhub.plan import Adoption, LayerPlan, Skip, WeightInfo

if TYPE_CHECKING:
    from qhub.calibration import CalibrationOptions

__all__: list[str] = []


@hookimpl
def qhub_config() -> ConfigSpec:
    return ConfigSpec(
        cls="qhub_gguf.config:GgufQuantConfig",
        skip="modules_to_not_convert",
        head="output",
        embeddings="embeddings",
        presets={
            "q4_k_m": {"file_type": "Q4_K_M"},
            "q8_0": {"file_type": "Q8_0"},
            "q6_k": {"file_type": "Q6_K"},
            "q5_k_m": {"file_type": "Q5_K_M"},
            "q3_k_m": {"file_type": "Q3_K_M"},
            "q2_k": {"file_type": "Q2_K"},
            "iq4_xs": {"file_type": "IQ4_XS"},
        },
    )


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo], model_config: Any) -> Mapping[str, LayerPlan | Skip]:
    from qhub_gguf.plan import plan_weights

    return plan_weights(config, weights, model_config)


@hookimpl
def qhub_quantize(
    config: Any, weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor], parameter: str, expert: int | None
) -> Mapping[str, Tensor]:
    from qhub.layouts.blocks import Blocks
    from qhub_gguf.plan import importance_of

    assert isinstance(layout, Blocks)
    importance = statistics.get("mean_square")
    if importance is None:
        importance = importance_of(config, parameter, expert)
    return layout.fitted(weight, importance)


@hookimpl
def qhub_calibration(config: Any) -> CalibrationOptions | None:
    from qhub.calibration import CalibrationOptions

    # llama.cpp measures on the unquantized model: every input of a block comes from one pass.
    return CalibrationOptions(sequential="block") if config.calibrate else None


@hookimpl
def qhub_format(config: Any) -> Format:
    from qhub_gguf.format import BlocksFormat

    return BlocksFormat()


@hookimpl
def qhub_container(config: Any, file: Path) -> Container:
    from qhub_gguf.loading import GgufContainer

    return GgufContainer(file, bool(config.dequantize))


@hookimpl
def qhub_save(
    config: Any, model: Any, folder: Path, container: Container | None, max_shard_size: int | str
) -> Sequence[Path]:
    from qhub_gguf.saving import save

    return save(config, model, folder, container, max_shard_size)  # type: ignore[arg-type]


@hookimpl
def qhub_adopt(layouts: Mapping[str, Layout], options: Mapping[str, Any]) -> Adoption:
    from qhub_gguf.adopt import adopt

    return adopt(layouts, options)


@hookimpl
def qhub_kernels() -> list[KernelSpec]:
    return [
        KernelSpec(
            name="blocks-in-pieces",
            impl="qhub_gguf.records.linear:linear",
            layout="blocks",
            devices=frozenset({"cpu"}),
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
        )
    ]
