"""What a checkpoint format is: a pair of pure functions between a layout's tensors and the entries of a file.

Both work on ONE matrix and on *local* names: an entry ``"qweight"`` of the linear layer ``model.layers.0.mlp.up_proj``
is the tensor ``model.layers.0.mlp.up_proj.qweight`` in the file. Fused experts are taken apart before, and put together
after.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qhub.errors import LayoutError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qhub.layouts import Layout

__all__ = ["Entry", "Format", "Fusion"]


@dataclass(frozen=True)
class Entry:
    """Describes one tensor that a file holds for a weight, so that a file can be checked before it is read.

    ``shape``: None where it may vary. ``dtypes``: those allowed; empty allows all. ``required``: False for what older
    writers left out.
    """

    shape: tuple[int, ...] | None
    dtypes: tuple[torch.dtype, ...] = ()
    required: bool = True


@dataclass(frozen=True)
class Fusion:
    """Describes linear layers that a checkpoint stores on top of each other as one, which a model has one by one.

    ``members``: the model's modules, in the order of their rows. ``scales``: the local name of a tensor (members,),
    beside the whole's entries, whose entries the members' outputs are multiplied by; None where there is none.
    """

    members: tuple[str, ...]
    scales: str | None = None


class Format(ABC):
    """Translates between the parts of a layout and the entries of a checkpoint file."""

    @property
    @abstractmethod
    def markers(self) -> frozenset[str]:
        """Return the local names that prove a weight is stored quantized (``{"qweight"}``; not ``"weight"`` alone)."""

    @abstractmethod
    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        """Return every entry that a file may hold for one weight of ``layout``, optional ones included."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Return every local name that the format can use, for whatever layout."""

    def aliases(self, prefix: str) -> Iterable[str]:
        """Return other names for the module ``prefix`` of a file, where its writers do not call it as models do."""
        return ()

    @property
    def passengers(self) -> frozenset[str]:
        """Return the local names of tensors that belong to no weight and have no place in a model (scales of the
        key-value cache): they are carried along and written back."""
        return frozenset()

    @property
    def fusions(self) -> Mapping[str, Fusion]:
        """Return which modules a checkpoint may have instead of several of the model's, by the whole's last name.

        Where all matrices of a group can be cut by rows, transformers' own conversions do; this is for the others.
        """
        return {}

    @property
    def stacks(self) -> Mapping[str, str]:
        """Return {ending of a key: local name} of entries that a file may hold for all experts of a fused parameter at
        once, the experts leading: ``{"_blocks": "weight_blocks"}`` reads and writes ``experts.down_proj_blocks``.

        So are written fused parameters whose experts a model's published checkpoints do not have one by one.
        """
        return {}

    @property
    def stack_lead(self) -> str:
        """Return what stands before the parameter's name in the keys of :attr:`stacks` (``_`` for
        ``experts._down_proj_blocks``)."""
        return ""

    @property
    def always_stacks(self) -> bool:
        """Return whether fused parameters are written stacked although published checkpoints have experts one by
        one."""
        return False

    def check(self, layout: Layout, entries: Mapping[str, Tensor], settings: str) -> None:
        """Raise :class:`LayoutError` unless what :meth:`entries` requires is there, all of the declared shapes and
        dtypes.

        ``settings``: what the config says of the weight, for the message.
        """
        expected = self.entries(layout)
        required = sorted(name for name, entry in expected.items() if entry.required)
        for name in required:
            if name not in entries:
                raise LayoutError(f"the entry {name!r} is missing: a weight needs {required}, found {sorted(entries)}")
        for name in expected.keys() & entries.keys():
            entry, found = expected[name], entries[name]
            right_shape = entry.shape is None or tuple(found.shape) == entry.shape
            if not right_shape or (entry.dtypes and found.dtype not in entry.dtypes):
                wanted = " or ".join(map(_name, entry.dtypes)) or "any dtype"
                raise LayoutError(
                    f"entry {name!r} is {_name(found.dtype)} {tuple(found.shape)}, expected {wanted} "
                    f"{entry.shape or 'of any shape'} for {settings}"
                )

    @abstractmethod
    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the file entries for ``parts``; nothing is modified. Bit-exact: :meth:`unpack` gives ``parts`` back.

        ``dtype``: of the dense weight that the parts stand for; some formats record it.
        """

    @abstractmethod
    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        """Return layout and parts for file ``entries``; ``layout`` is the planned one, the result may refine it.

        Raise :class:`qhub.errors.LayoutError` when the entries contradict each other or the plan; the caller adds the
        weight's name and the file's.
        """

    def metadata(self, weights: Mapping[str, tuple[Layout, torch.dtype]], dense: Iterable[str]) -> dict[str, str]:
        """Return what the header of a file says besides its tensors, for formats that need it.

        ``weights``: layout and dtype of the dense weight, by the name of the model's parameter; ``dense``: names of
        the other parameters and buffers. Names are the model's own, also where the file's differ.
        """
        return {}

    def check_metadata(self, metadata: Mapping[str, str], layouts: Mapping[str, Layout]) -> list[str]:
        """Return what the headers of a checkpoint, taken together as ``metadata``, say against the planned ``layouts``
        by parameter; [] when nothing.

        A file may have lost its metadata: what is not there is no contradiction.
        """
        return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
