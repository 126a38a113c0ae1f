"""How one tensor of a GGUF file becomes (a part of) one parameter of a model, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhub.errors import CheckpointError

__all__ = ["MINUS_ONE", "NEGATIVE_EXP", "PLAIN", "Change", "Entry", "Part", "Recipe"]


@dataclass(frozen=True)
class Change:
    """Is a change of values, done in float32 on dense tensors: ``to_model`` and its inverse ``to_file``."""

    name: str
    to_model: Callable[[Tensor], Tensor]
    to_file: Callable[[Tensor], Tensor]


# convert_hf_to_gguf stores w + 1 where a model multiplies by (1 + w): Gemma's and Nemotron's norms.
MINUS_ONE = Change("w + 1", lambda tensor: tensor.float() - 1, lambda tensor: tensor.float() + 1)
# ... and A where a state-space model keeps log(-A).
NEGATIVE_EXP = Change("-exp(w)", lambda tensor: torch.log(-tensor.float()), lambda tensor: -torch.exp(tensor.float()))


@dataclass(frozen=True)
class Part:
    """Says which part of a parameter a tensor is: number ``index`` of ``count`` along ``dim`` (of the parameter seen as
    (.., N, K) matrices). ``interleaved``: every ``count``-th row instead of a block of rows. ``sizes``: of the parts
    where they differ."""

    dim: int
    index: int
    count: int
    interleaved: bool = False
    stacked: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part of ``tensor``, a view."""
        if self.stacked:
            return tensor.select(self.dim, self.index)
        if self.interleaved:
            return tensor[(slice(None),) * self.dim + (slice(self.index, None, self.count),)]
        return tensor.chunk(self.count, self.dim)[self.index]


@dataclass(frozen=True, eq=False)
class Recipe:
    """Says what happens to a tensor's numbers between file and model; everything None or False: nothing.

    ``rows``: the parameter's row r is the file's row ``rows[r]``, int64 (N,); exact for packed rows too, and for the
    entries of a bias. ``columns``: the same for input features; a packed tensor keeps its columns and its *input* is
    permuted instead: ``W_model @ x == W_file @ x[argsort(columns)]``. ``part``: the tensor is one part of the
    parameter. ``change``: of values; such tensors are never blocks. ``axis``: the parameter has one more axis, of size
    1, there. ``transposed``: the parameter is held as (K, N) (GPT-2's ``Conv1D``, gpt-oss's experts); the file has (N,
    K), as qhub packs it.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    part: Part | None = None
    change: Change | None = None
    axis: int | None = None
    transposed: bool = False


PLAIN = Recipe()


@dataclass(frozen=True, eq=False)
class Entry:
    """Connects the file's tensor ``ggml`` with the model's parameter ``hf``; see :class:`Recipe`."""

    ggml: str
    hf: str
    recipe: Recipe = PLAIN

    @property
    def packable(self) -> bool:
        """Return whether the parameter can keep the file's blocks: rows may move, numbers may not change."""
        return self.recipe.change is None and self.recipe.axis is None

    def to_model(self, tensor: Tensor) -> Tensor:
        """Return the dense parameter, or its part, for the dense ``tensor`` of the file."""
        recipe = self.recipe
        dim = _row_dim(tensor, self.ggml)
        if recipe.rows is not None:
            tensor = tensor.index_select(dim, _for(recipe.rows, tensor, dim, self.ggml))
        if recipe.columns is not None:
            tensor = tensor.index_select(-1, _for(recipe.columns, tensor, tensor.ndim - 1, self.ggml))
        if recipe.change is not None:
            tensor = recipe.change.to_model(tensor)
        if recipe.axis is not None:
            tensor = tensor.unsqueeze(recipe.axis)
        return tensor.mT if recipe.transposed and tensor.ndim > 1 else tensor

    def to_file(self, parameter: Tensor) -> Tensor:
        """Return the dense tensor of the file for the dense ``parameter``: its own part of it, if it is one of several.

        The inverse of :meth:`to_model` with :meth:`assembled`.
        """
        recipe = self.recipe
        tensor = parameter.mT if recipe.transposed and parameter.ndim > 1 and not _bias(self.hf) else parameter
        if recipe.part is not None:
            tensor = recipe.part.of(tensor)
        if recipe.axis is not None:
            tensor = tensor.squeeze(recipe.axis)
        if recipe.change is not None:
            tensor = recipe.change.to_file(tensor)
        dim = _row_dim(tensor, self.ggml)
        if recipe.columns is not None:
            tensor = tensor.index_select(-1, torch.argsort(_for(recipe.columns, tensor, tensor.ndim - 1, self.ggml)))
        if recipe.rows is not None:
            tensor = tensor.index_select(dim, torch.argsort(_for(recipe.rows, tensor, dim, self.ggml)))
        return tensor.contiguous()

    @staticmethod
    def assembled(entries: list[Entry], tensors: list[Tensor]) -> Tensor:
        """Return the dense parameter that several entries are the parts of, from what :meth:`to_model` would take.

        ``entries``: all parts, in any order, or the only one.
        """
        if entries[0].recipe.part is None:
            return entries[0].to_model(tensors[0])
        order = sorted(range(len(entries)), key=lambda number: _part(entries[number]).index)
        part = _part(entries[0])
        if [_part(entries[number]).index for number in order] != list(range(part.count)):
            raise CheckpointError(
                f"{entries[0].hf!r} is made of {part.count} tensors, and the file has only "
                f"{[entry.ggml for entry in entries]}"
            )
        # Parts are of matrices as the file has them; the transposition is of the whole.
        plain = [replace(entries[number], recipe=replace(entries[number].recipe, transposed=False)) for number in order]
        pieces = [entry.to_model(tensors[number]) for entry, number in zip(plain, order, strict=True)]
        if part.stacked:
            whole = torch.stack(pieces, part.dim)
        elif part.interleaved:
            whole = torch.stack(pieces, part.dim + 1).flatten(part.dim, part.dim + 1)
        else:
            whole = torch.cat(pieces, part.dim)
        return whole.mT if entries[0].recipe.transposed and not _bias(entries[0].hf) else whole


def _part(entry: Entry) -> Part:
    if entry.recipe.part is None:
        raise CheckpointError(f"two tensors of the file claim the parameter {entry.hf!r}; one is {entry.ggml!r}")
    return entry.recipe.part


def _bias(name: str) -> bool:
    return name.endswith("bias")


def _row_dim(tensor: Tensor, name: str) -> int:
    """Return the dimension of the rows: the last but one, or the only one of a bias."""
    if tensor.ndim == 0:
        raise CheckpointError(f"tensor {name!r} has no dimension")
    return max(tensor.ndim - 2, 0)


def _for(index: Tensor, tensor: Tensor, dim: int, name: str) -> Tensor:
    if len(index) != tensor.shape[dim]:
        raise CheckpointError(
            f"tensor {name!r} has {tensor.shape[dim]} rows or columns to reorder; the config makes it {len(index)}"
        )
    return index.to(tensor.device)
