"""Layers that a checkpoint stores as one where the model has several: the whole is one layer, each module a piece.

A quantized matrix cannot always be cut: its outputs may be rotated together, as queries, keys and values are in QuIP#.
So the model gets the whole as a layer of its own, under the checkpoint's name, and in the place of each of its modules
a piece, which runs the whole, or takes what another piece with the same input has just got, and returns its own
features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qhub.formats import Format, Fusion
from qhub.integrations.transformers.checkpoint import FileTensor, sort_entries

__all__ = ["Piece", "put_fused", "undo_fused"]


class _Last:
    """Holds the whole's last output, until every piece has taken its part of it."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Input, what it was like, output, pieces that took their part. One assignment: threads see all of it or none.
        self.held: tuple[Tensor, tuple[int, bool], Tensor, frozenset[int]] | None = None

    def take(self, piece: int, x: Tensor) -> Tensor | None:
        """Return the output for ``x`` if it is at hand, and forget it after the last piece."""
        held = self.held
        if held is None or held[0] is not x or held[1] != _state(x) or piece in held[3]:
            return None
        taken = held[3] | {piece}
        self.held = None if len(taken) == self.count else (*held[:3], taken)
        return held[2]

    def keep(self, piece: int, x: Tensor, y: Tensor) -> None:
        """Note ``y`` as the output for ``x``, which ``piece`` has taken its part of."""
        self.held = (x, _state(x), y, frozenset({piece}))

    def __deepcopy__(self, memo: Any) -> _Last:
        return _Last(self.count)

    def __reduce__(self) -> Any:
        return _Last, (self.count,)


def _state(x: Tensor) -> tuple[int, bool]:
    """Return what tells whether ``x`` was written into, and whether gradients are wanted."""
    # Tensors made in inference mode count no versions.
    return (0 if x.is_inference() else x._version), torch.is_grad_enabled()


class Piece(nn.Module):
    """Gives output features [start, stop) of the module ``name`` of ``owner``, times entry ``index`` of its scales.

    ``scales``: the name of that tensor; None where there is none. Has no tensors of its own.
    """

    def __init__(
        self, owner: nn.Module, name: str, index: int, start: int, stop: int, scales: str | None, last: _Last
    ) -> None:
        super().__init__()
        # Not as a submodule: the whole's tensors have one name, under its owner.
        object.__setattr__(self, "_owner", (owner,))
        self._whole, self._index, self._scales, self._last = name, index, scales, last
        self.start, self.stop = start, stop
        self.in_features, self.out_features = getattr(owner, name).in_features, stop - start

    @property
    def owner(self) -> nn.Module:
        """Return the module that has both this piece and the whole."""
        return self.__dict__["_owner"][0]

    @property
    def whole(self) -> Any:
        """Return the layer that this is a piece of: as it is now, an adapter may have been put around it."""
        return getattr(self.owner, self._whole)

    @property
    def scale(self) -> Tensor | None:
        """Return the scale of the piece, (); None where there is none."""
        if self._scales is None:
            return None
        whole = self.whole
        inner = whole.get_base_layer() if hasattr(whole, "get_base_layer") else whole
        return getattr(inner, self._scales)[self._index]

    def forward(self, x: Tensor) -> Tensor:
        # A compiler sees the whole computation, and must not see a memory that outlives it.
        remembers = not torch.compiler.is_compiling()
        y = self._last.take(self._index, x) if remembers else None
        if y is None:
            y = self.whole(x)
            if remembers:
                self._last.keep(self._index, x, y)
        part, scale = y[..., self.start : self.stop], self.scale
        return part if scale is None else part * scale.to(part)

    def extra_repr(self) -> str:
        return f"features {self.start} to {self.stop} of {self._whole}"


def put_fused(model: nn.Module, headers: Mapping[str, FileTensor], fmt: Format) -> None:
    """Give ``model`` the layers that the checkpoint of ``headers`` stores as one, and pieces in place of its own.

    Only where the checkpoint has the whole, and the model its members: linear layers without bias, of one input.
    """
    if not fmt.fusions:
        return
    stored, _ = sort_entries(dict(headers), fmt)
    for prefix in stored:
        parent, _, name = prefix.rpartition(".")
        fusion = fmt.fusions.get(name)
        if fusion is None:
            continue
        try:
            owner = model.get_submodule(parent)
        except AttributeError:
            continue
        members = [getattr(owner, member, None) for member in fusion.members]
        if hasattr(owner, name) or not all(type(m) is nn.Linear and m.bias is None for m in members):
            continue
        _fuse(owner, name, fusion, members)  # type: ignore[arg-type]


def _fuse(owner: nn.Module, name: str, fusion: Fusion, members: list[nn.Linear]) -> None:
    first = members[0]
    sizes = [member.out_features for member in members]
    whole = nn.Linear(first.in_features, sum(sizes), bias=False, device="meta", dtype=first.weight.dtype)
    whole.train(first.training)
    if fusion.scales is not None:
        ones = torch.empty(len(sizes), device="meta", dtype=first.weight.dtype)
        whole.register_parameter(fusion.scales, nn.Parameter(ones, requires_grad=False))
    owner.add_module(name, whole)
    last, start = _Last(len(sizes)), 0
    for index, (member, size) in enumerate(zip(fusion.members, sizes, strict=True)):
        piece = Piece(owner, name, index, start, start + size, fusion.scales, last)
        owner.add_module(member, piece.train(first.training))
        start += size


def undo_fused(model: nn.Module) -> None:
    """Put dense linear layers in the place of pieces, and take away the wholes; these are dense already."""
    wholes: dict[nn.Module, set[str]] = {}
    for prefix, piece in [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, Piece)]:
        scale, weight = piece.scale, piece.whole.weight[piece.start : piece.stop]
        plain = nn.Linear(piece.in_features, piece.out_features, bias=False, device="meta")
        dense = weight.detach().clone() if scale is None else weight.detach() * scale.to(weight)
        plain.weight = nn.Parameter(dense, requires_grad=False)
        model.set_submodule(prefix, plain.train(piece.training))
        wholes.setdefault(piece.owner, set()).add(piece._whole)
    for owner, names in wholes.items():
        for name in names:
            delattr(owner, name)
