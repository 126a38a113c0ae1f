"""Keeps what blocks return, sample by sample: on the compute device, in main memory, or on the disk."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Activations", "moved"]


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Return ``value`` with every tensor in it on ``device``; floating ones in ``dtype`` unless that is None."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype)

    return pytree.tree_map(one, value)


class Activations:
    """Holds one value (tensors in any structure) a batch.

    ``place``: ``"device"`` keeps them where they are, ``"cpu"`` in main memory, ``"disk"`` in files under ``scratch``
    (None: the system's folder for temporary files), which :meth:`close` removes.
    """

    def __init__(self, place: Literal["device", "cpu", "disk"], scratch: Path | None = None) -> None:
        self._place = place
        self._values: dict[int, Any] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="qhub-activations-", dir=scratch)) if place == "disk" else None

    def __contains__(self, batch: int) -> bool:
        return batch in self._values

    def __setitem__(self, batch: int, value: Any) -> None:
        if self._place == "device":
            self._values[batch] = value
        elif self._place == "cpu":
            self._values[batch] = moved(value, torch.device("cpu"))
        else:
            assert self._folder is not None
            leaves, structure = pytree.tree_flatten(value)
            tensors = {str(i): leaf.detach().cpu().contiguous() for i, leaf in enumerate(leaves) if _is_tensor(leaf)}
            # Views of one memory would be refused: each is written on its own.
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, self._file(batch))
            self._values[batch] = structure, [None if _is_tensor(leaf) else leaf for leaf in leaves]

    def __getitem__(self, batch: int) -> Any:
        if self._place != "disk":
            return self._values[batch]
        structure, leaves = self._values[batch]
        tensors = load_file(self._file(batch))
        return pytree.tree_unflatten([tensors.get(str(i), leaf) for i, leaf in enumerate(leaves)], structure)

    def get(self, batch: int) -> Any:
        """Return the value of ``batch``, None when there is none."""
        return self[batch] if batch in self._values else None

    def close(self) -> None:
        """Forget everything."""
        self._values.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, batch: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{batch}.safetensors"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
