"""What a checkpoint file of another kind than safetensors has to say: GGUF files hold config and tokenizer too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qhub.layouts import Layout
    from qhub.plan import WeightInfo

__all__ = ["Container", "Packed"]


@dataclass(frozen=True)
class Packed:
    """Is one quantized parameter: a layout of one matrix, and its parts, with a leading dimension where experts are
    fused."""

    layout: Layout
    parts: Mapping[str, Tensor]


class Container(ABC):
    """Is an opened checkpoint file: its header is read and checked, its tensors are read when they are used.

    ``files``: the file, and what else it is split into.
    """

    files: tuple[Path, ...]

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype | None:
        """Return the dtype to load the model in where the caller does not say; None when the file does not tell."""

    @property
    @abstractmethod
    def embeddings(self) -> bool:
        """Return whether the file stores the input embeddings quantized."""

    @abstractmethod
    def parameters(self, model: Any, weights: Mapping[str, WeightInfo]) -> dict[str, Tensor | Packed]:
        """Return every parameter and buffer that the file holds for ``model``, by the model's own name.

        One among ``weights`` that is stored quantized comes packed, lying in the file where possible; anything else as
        a plain tensor. Raises :class:`qhub.errors.CheckpointError` naming the tensor and the file.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the model's config as the values of a ``config.json``, ``model_type`` and ``architectures`` among
        them."""

    @abstractmethod
    def tokenizer(self) -> tuple[Any, dict[str, Any]]:
        """Return the file's tokenizer, a ``tokenizers.Tokenizer``, and what transformers' tokenizer class takes beside
        it (special tokens, chat template)."""
