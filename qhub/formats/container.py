"""What a checkpoint file of another kind than safetensors has to say: GGUF files hold config and tokenizer too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qhub.plan import LayerPlan, Skip, WeightInfo

__all__ = ["Container"]


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
    def tensors(self, model: Any, weights: Mapping[str, WeightInfo]) -> dict[str, Tensor]:
        """Return every tensor for ``model`` by checkpoint key, as safetensors files would hold it.

        A weight among ``weights``, by parameter name, that is stored quantized comes as the entries of the method's
        format (``X.blocks``), lying in the file where possible; anything else as a plain tensor under its own name.
        Raises :class:`qhub.errors.CheckpointError` naming the tensor and the file.
        """

    @abstractmethod
    def plan(self, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
        """Return how each of ``weights`` is stored; names are those of parameters or of checkpoint keys with
        ``.weight``."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Return what the file says besides weights: ``{"config": ..., "tokenizer": ..., "tokenizer_config": ...}``,
        as transformers' ``load_gguf_checkpoint`` does."""
