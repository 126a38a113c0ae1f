"""What one process holds of a quantized weight under FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qhub.errors import UnsupportedError
from qhub.sharding.recipe import Recipe
from qhub.tensor import QuantizedTensor

__all__ = ["SHARD_OPERATORS", "QuantizedShard"]

# What is done for an operator of torch's dispatcher; filled by qhub.sharding.operators. All others are refused.
SHARD_OPERATORS: dict[Any, Callable] = {}


class QuantizedShard(torch.Tensor):
    """Is what one process holds of a quantized weight under FSDP2: a piece of its bytes, with the shape of its rows.

    ``codes`` (bytes,) uint8: the piece. ``recipe``: how all pieces are the weight again. ``tables``: what is not cut.
    It cannot compute: FSDP gathers the weight before a layer runs, and ``full_tensor()`` of the parameter does
    elsewhere.
    """

    codes: Tensor
    recipe: Recipe
    tables: dict[str, Tensor]

    @staticmethod
    def __new__(
        cls, codes: Tensor, recipe: Recipe, tables: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> QuantizedShard:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=recipe.dtype, device=codes.device, requires_grad=False
        )
        self.codes, self.recipe, self.tables = codes, recipe, dict(tables)
        return self

    def __init__(self, *args: Any) -> None:
        # torch.Tensor.__init__ would refuse the arguments of __new__.
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"QuantizedShard({self.recipe.layout.kind}, shape={tuple(self.shape)} of {self.recipe.shape}, "
            f"{self.codes.numel()} of {self.recipe.length} bytes, device={self.device})"
        )

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Return the bytes held, shared tables left out."""
        return self.codes.numel()

    def _like(self, codes: Tensor | None = None, shape: Any = None, recipe: Recipe | None = None) -> QuantizedShard:
        codes = self.codes if codes is None else codes
        tables = self.tables
        if codes.device != self.device:
            tables = {name: table.to(codes.device) for name, table in tables.items()}
        shape = tuple(self.shape if shape is None else shape)
        return QuantizedShard(codes, recipe or self.recipe, tables, shape)

    # -- what FSDP2 calls --------------------------------------------------------------------------------------------

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """Return what is sent: the bytes as they are.

        torch also offers a longer signature; with it FSDP insists that what is sent has as many rows as the weight.
        """
        return (self.codes,), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """Return the weight on the ``gathered`` bytes; ``out``: the one returned before, on the same memory."""
        (run,) = gathered
        if out is None:
            return self.recipe.weight(run, self.tables, param_dtype), (run,)
        held = out.to_local() if hasattr(out, "to_local") else out
        if not isinstance(held, QuantizedTensor) or held.dtype != param_dtype:
            raise UnsupportedError(
                f"FSDP asks for a quantized weight in {param_dtype} and holds {type(held).__name__} {held.dtype}: "
                "the mixed precision policy cannot change once the model has run"
            )
        return None

    # -- what torch calls --------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "one process's piece of a quantized weight cannot be pickled or saved by itself: save the adapter (the "
            "base does not change in training), or gather the weights first, as "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(full_state_dict=True) does"
        )

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = SHARD_OPERATORS.get(func)
        if handler is None:
            raise UnsupportedError(
                f"{func} was called on one process's piece of a quantized weight, which cannot compute. Inside a layer "
                "FSDP gathers the weight first: is the layer called through the module that fully_shard was given? "
                "Elsewhere full_tensor() of the parameter gathers it"
            )
        return handler(*args, **(kwargs or {}))
