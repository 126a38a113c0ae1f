"""QuantizedTensor: a torch.Tensor over any layout, with the shape, dtype and device of the dense weight it stands for.

``F.linear`` goes to the kernels; views of leading dimensions, moves, transposition, FSDP's and torch.compile's
flattening keep it quantized; writing into it requantizes onto its layout; every other operation runs on the dequantized
weight. Gradients flow to inputs, never to codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from qhub.errors import LayoutError, UnsupportedError
from qhub.layouts import Layout, nbytes
from qhub.layouts.keys import layout_key, layout_of
from qhub.merging import AdapterPolicy

__all__ = ["QuantizedTensor"]


class QuantizedTensor(torch.Tensor):
    """Stands for a dense weight (..., N, K) held as the parts of a layout.

    Make one with :meth:`build`. ``quant_layout``: describes one (N, K) matrix. ``parts``: the tensors, with leading
    batch dimensions for fused experts. ``compute_dtype``: products run in it; None: in the input's. ``policy``: what
    writing does. ``transposed``: the tensor is seen as (..., K, N). ``dequantize()`` returns the dense weight.
    """

    quant_layout: Layout
    parts: dict[str, Tensor]
    compute_dtype: torch.dtype | None
    policy: AdapterPolicy
    transposed: bool
    memo: dict[Any, Any]
    key: str
    # Whether it is a copy that nothing else sees; see qhub.operators.
    scratch: bool = False

    @staticmethod
    def __new__(cls, source: QuantizedTensor, requires_grad: bool = False) -> QuantizedTensor:
        """Return an alias of ``source``: libraries rebuild a parameter with ``type(parameter)(value,
        requires_grad=...)``."""
        if not isinstance(source, QuantizedTensor):
            raise LayoutError(
                f"a QuantizedTensor cannot be made from a {type(source).__name__}: use QuantizedTensor.build(layout, "
                "parts, dtype)"
            )
        if requires_grad:
            raise UnsupportedError(NO_GRADIENT)
        return source._like(source.parts)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # torch.Tensor.__init__ would refuse the arguments of __new__.
        pass

    @classmethod
    def build(
        cls,
        layout: Layout,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype,
        *,
        compute_dtype: torch.dtype | None = None,
        policy: AdapterPolicy | None = None,
        transposed: bool = False,
    ) -> QuantizedTensor:
        """Return the tensor that ``parts`` stand for on ``layout``, of dense ``dtype``.

        Raises :class:`LayoutError` when the parts do not fit the layout.
        """
        layout.validate(parts)
        return cls._wrap(layout, parts, dtype, compute_dtype, policy or AdapterPolicy(), transposed)

    @classmethod
    def _wrap(
        cls,
        layout: Layout,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
        policy: AdapterPolicy,
        transposed: bool,
    ) -> QuantizedTensor:
        n, k = layout.out_features, layout.in_features
        shape = (*layout.batch_shape(parts), *((k, n) if transposed else (n, k)))
        device = next(iter(parts.values())).device
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)  # type: ignore[attr-defined]
        self._set(layout, parts, compute_dtype, policy, transposed)
        return self

    def _set(
        self,
        layout: Layout,
        parts: Mapping[str, Tensor],
        compute_dtype: torch.dtype | None,
        policy: AdapterPolicy,
        transposed: bool,
    ) -> None:
        self.key = layout_key(layout)
        # One object for all equal layouts: what is looked up by layout at every call then compares identities.
        self.quant_layout, names = layout_of(self.key)
        # In the order of the layout's specs: a compiled operator gets them as a plain list.
        self.parts = {name: parts[name] for name in names}
        self.compute_dtype = compute_dtype
        self.policy = policy
        self.transposed = transposed
        self.memo = {}
        # torch.compile and FSDP reach the inner tensors as attributes, by the names of __tensor_flatten__.
        for name, part in self.parts.items():
            setattr(self, f"part_{name}", part)

    def _like(self, parts: Mapping[str, Tensor], dtype: torch.dtype | None = None, **changes: Any) -> QuantizedTensor:
        result = self._wrap(
            changes.get("layout", self.quant_layout),
            parts,
            dtype or self.dtype,
            self.compute_dtype,
            self.policy,
            changes.get("transposed", self.transposed),
        )
        if parts is self.parts and result.quant_layout is self.quant_layout:
            # An alias of the same tensors: what kernels made of them serves it too.
            result.memo = self.memo
        return result

    # -- what it stands for ------------------------------------------------------------------------------------------

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """Return the dense weight in ``dtype``; None for the tensor's own."""
        dense = self.quant_layout.dequantize(self.parts, dtype or self.dtype)
        return dense.transpose(-1, -2) if self.transposed else dense

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Return the bytes its parts take in memory."""
        return nbytes(self.parts)

    def in_plain_order(self) -> QuantizedTensor:
        """Return the same weight with its parts as methods and files know them; itself unless it was arranged."""
        if not self.quant_layout.arranged:
            return self
        layout, parts = self.quant_layout.plain(self.parts)
        return self._like(parts, layout=layout)

    def write_(self, dense: Tensor) -> QuantizedTensor:
        """Requantize ``dense`` (same shape) onto the layout, in place: the parts keep their shapes and storage.

        Raises :class:`UnsupportedError` when the method refuses writes, or when a value is not finite.
        """
        if self.policy.refuse is not None:
            raise UnsupportedError(f"this quantized weight cannot be written into: {self.policy.refuse}")
        if dense.shape != self.shape:
            dense = dense.expand(self.shape)
        with torch.no_grad():
            dense = dense.detach().to(self.device, torch.float32)
            if dense.device.type != "meta" and not bool(torch.isfinite(dense).all()):
                raise UnsupportedError(
                    "the values to write into a quantized weight hold NaN or infinity: nothing was written"
                )
            if self.transposed:
                dense = dense.transpose(-1, -2)
            written = self.quant_layout.requantize(dense, self.parts, self.policy.grid)
            for name, part in self.parts.items():
                if written[name] is not part:
                    part.copy_(written[name])
                # What kernels made of the old codes; below autograd no version counts a write.
                part.__dict__.pop("_qhub_bound", None)
        self.memo.clear()
        return self

    def check_gradients(self, *values: Any) -> None:
        """Raise :class:`UnsupportedError` where writing ``values`` into the codes would cut off their gradient."""
        if not torch.is_grad_enabled() or not (self.scratch or isinstance(self, torch.nn.Parameter)):
            return
        if any(isinstance(value, Tensor) and value.requires_grad for value in values):
            raise UnsupportedError(
                "a quantized weight cannot take values that require gradients in place: its codes would lose the "
                "gradient. Use w + delta, which is dense, or write under torch.no_grad()"
            )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"QuantizedTensor({self.quant_layout.kind}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, {8 * self.nbytes / max(self.numel(), 1):.3f} bits per weight)"
        )

    # -- protocols of torch ------------------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = tuple(self.parts)
        context = (self.quant_layout, names, self.dtype, self.compute_dtype, self.policy, self.transposed)
        return [f"part_{name}" for name in names], context

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> QuantizedTensor:
        layout, names, dtype, compute_dtype, policy, transposed = context
        return cls._wrap(layout, {n: inner[f"part_{n}"] for n in names}, dtype, compute_dtype, policy, transposed)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) in memo:
            return memo[id(self)]
        result = self._like({name: part.clone() for name, part in self.parts.items()})
        memo[id(self)] = result
        for name, value in self.__dict__.items():
            if name not in result.__dict__:
                result.__dict__[name] = copy.deepcopy(value, memo)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        extra = {"_is_param": True} if getattr(self, "_is_param", False) else {}
        arguments = (
            self.quant_layout,
            dict(self.parts),
            self.dtype,
            self.compute_dtype,
            self.policy,
            self.transposed,
            extra,
        )
        return _rebuild, arguments

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = FUNCTIONS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = OPERATORS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_dense(func, args, kwargs)


NO_GRADIENT = (
    "a quantized weight cannot require gradients: its codes are integers. Train an adapter on it (any PEFT tuner), or "
    "dequantize the model first (model.dequantize())"
)


def _rebuild(
    layout: Layout, parts: dict[str, Tensor], dtype: Any, compute_dtype: Any, policy: Any, transposed: bool, extra: dict
) -> QuantizedTensor:
    result = QuantizedTensor._wrap(layout, parts, dtype, compute_dtype, policy, transposed)
    for name, value in extra.items():
        setattr(result, name, value)
    return result


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on dequantized weights; if it writes into a quantized one, requantize the result into it."""
    written = [
        (args[i] if i < len(args) else kwargs.get(argument.name))
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    targets = [value for value in tree_flatten(written)[0] if isinstance(value, QuantizedTensor)]
    for target in targets:
        target.check_gradients(*tree_flatten((args, kwargs))[0])
    dense: dict[int, Tensor] = {}

    def densify(value: Any) -> Any:
        if not isinstance(value, QuantizedTensor):
            return value
        if id(value) not in dense:
            # An in-place operator needs memory of its own, not the transposed view of a dequantized matrix.
            dense[id(value)] = value.dequantize().contiguous()
        return dense[id(value)]

    result = func(*tree_map(densify, args), **tree_map(densify, kwargs))
    for target in targets:
        target.write_(dense[id(target)])
    return targets[0] if targets else result


# What is done for a function of torch's API, and for an operator of its dispatcher, instead of running it on the
# dequantized weight. Filled by qhub.operators and qhub.sharding; a handler may answer NotImplemented.
FUNCTIONS: dict[Any, Callable] = {}
OPERATORS: dict[Any, Callable] = {}

from qhub import operators, replication, sharding  # noqa: E402, F401 - they need the class above
