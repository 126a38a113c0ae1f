"""What ``quip_params``, the settings of a QuIP# checkpoint, may say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from qhub.config import ConfigSpec, MethodConfig
from qhub.errors import ConfigError
from qhub_quip.lattices import CODEBOOKS, WIDTH

__all__ = ["QuipConfig", "spec"]


@dataclass
class QuipConfig(MethodConfig):
    """Holds the settings that QuIP#'s ``quantize_finetune_llama.py`` and ``hfize_llama.py`` write.

    ``codebook``: ``"E8P12"`` (2 bits), ``"E8P12RVQ3B"`` or ``"E8P12RVQ4B"``. ``resid_scale_override``: what the second
    code's vectors are divided by, if it is above zero; else the codebook's own scale. ``rescale_WH``: whether layers
    hold a vector that their input is divided by. The others describe the file, and one value is possible for each:
    ``codebook_version`` (None: the codebook's), ``codesz`` (weights of a code), ``packsz`` (how many codes a word
    holds, where that is a whole number; None: the codebook's), ``pack_out``, ``idx_dtype``, ``lora_rank`` (0: QuIP#
    itself no longer reads low-rank corrections), ``model_version``. ``train_mode`` says how QuIP# runs a model.
    """

    quant_method: ClassVar[str] = "quip"

    codebook: str = "E8P12"
    codebook_version: int | None = None
    codesz: int = WIDTH
    packsz: float | None = None
    pack_out: bool = False
    idx_dtype: str = "torch.int64"
    lora_rank: int = 0
    rescale_WH: bool = False
    resid_scale_override: float = -1
    model_version: int | None = None
    train_mode: bool = False

    def __post_init__(self) -> None:
        check(self)

    @property
    def residual_scale(self) -> float | None:
        """Return what the second code's vectors are divided by; None for the codebook's own scale."""
        return float(self.resid_scale_override) if self.resid_scale_override > 0 else None


def spec() -> ConfigSpec:
    """Return the description of :class:`QuipConfig`."""
    return ConfigSpec(cls=QuipConfig, check=check, skip="modules_to_not_convert", config_key="quip_params")


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on a value that no QuIP# checkpoint can have, or that QuIP# no longer reads."""
    if not isinstance(config.codebook, str) or config.codebook not in CODEBOOKS:
        raise ConfigError(f"codebook={config.codebook!r} of a quip config: QuIP# has {sorted(CODEBOOKS)}")
    kind = CODEBOOKS[config.codebook]
    for name, allowed in (
        ("codebook_version", (None, kind.version)),
        ("codesz", (WIDTH,)),
        ("pack_out", (False,)),
        ("idx_dtype", ("torch.int64",)),
        ("model_version", (None, 1)),
        ("rescale_WH", (False, True)),
        ("train_mode", (False, True)),
    ):
        value = getattr(config, name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ConfigError(
                f"{name}={value!r} of a quip config with codebook {config.codebook}: expected "
                f"{' or '.join(repr(one) for one in allowed)}; QuIP#'s newest code reads no other"
            )
    # "-1" and "0" both turn it off (quantize_finetune_llama.py, --lora_rank).
    if type(config.lora_rank) is not int or config.lora_rank > 0:
        raise ConfigError(
            f"lora_rank={config.lora_rank!r} of a quip config: low-rank corrections are not read, neither here nor by "
            "QuIP# since July 2024; use a checkpoint with lora_rank 0"
        )
    if config.packsz is not None and not (_is_number(config.packsz) and math.isclose(config.packsz, kind.packsz)):
        raise ConfigError(f"packsz={config.packsz!r} of a quip config: {config.codebook} has {kind.packsz:g}")
    scale = config.resid_scale_override
    if not _is_number(scale) or not math.isfinite(scale) or scale > 1e6 or 0 < scale < 1e-6:
        raise ConfigError(
            f"resid_scale_override={scale!r} of a quip config: expected a number of about 1 to 10, or -1 for the "
            "codebook's own"
        )
    listed = config.modules_to_not_convert
    if listed is not None and not (isinstance(listed, (list, tuple)) and all(isinstance(one, str) for one in listed)):
        raise ConfigError(f"modules_to_not_convert={listed!r} of a quip config: it is a list of names")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
