"""What can be asked of GGUF: which file to read, or which types to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qhub import MethodConfig
from qhub.errors import ConfigError

__all__ = ["GgufQuantConfig"]


@dataclass
class GgufQuantConfig(MethodConfig):
    """Names the file a model is read from, or how a model is quantized for one.

    ``gguf_file``: the file; transformers fills it in from ``from_pretrained(..., gguf_file=...)``. ``dequantize``: load
    dense weights instead of packed ones. ``file_type``: a mix by llama.cpp's name (``"Q4_K_M"``, ``"Q8_0"``,
    ``"IQ4_XS"``); which tensor gets which type is what llama.cpp decides. ``tensor_types``: types for the tensors whose
    GGUF name a regular expression matches, before the mix is asked (``{"ffn_down": "Q6_K"}``). ``imatrix``: a file with
    an importance matrix, as llama.cpp's ``llama-imatrix`` or qhub writes it. ``calibrate``: weigh errors by the inputs
    that layers take on calibration text. ``embeddings``, ``output``: whether the input embeddings and the output head
    are quantized too.
    """

    quant_method: ClassVar[str] = "gguf"

    gguf_file: str | None = None
    dequantize: bool = False
    file_type: str = "Q4_K_M"
    tensor_types: dict[str, str] | None = None
    imatrix: str | None = None
    calibrate: bool = False
    embeddings: bool = True
    output: bool = True

    def __post_init__(self) -> None:
        from qhub_gguf.mixes import file_type_of
        from qhub_gguf.types import TYPES

        try:
            file_type_of(self.file_type)
        except ConfigError as error:
            raise ConfigError(f"gguf: file_type={self.file_type!r}: {error}") from error
        for expression, name in (self.tensor_types or {}).items():
            if name not in TYPES:
                raise ConfigError(
                    f"gguf: tensor_types gives {expression!r} the type {name!r}, which ggml does not have"
                )
        if self.imatrix is not None and self.calibrate:
            raise ConfigError("gguf: imatrix names a file and calibrate asks to make one: choose one of them")
