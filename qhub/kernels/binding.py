"""Binds kernels to one weight: what they prepare is made once, and a call is a comparison of M and the kernel's own
work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qhub.errors import UnsupportedError
from qhub.kernels.dense import decoding
from qhub.kernels.spec import KernelSpec
from qhub.layouts import Layout, Parts

if TYPE_CHECKING:
    from qhub.kernels.dense_kernels import DecodeFunction
    from qhub.kernels.dispatch import Choice

__all__ = ["Bound", "Runner"]

BoundFunction = Callable[[Tensor, "Tensor | None"], Tensor]


class Runner:
    """Is one kernel, with one of its configs or without, as ``runner(x, layout, parts, bias)``.

    :meth:`bind` returns it for one weight, as ``function(x, bias)``.
    """

    __slots__ = ("_bind", "_impl", "_prepare", "config", "spec")

    def __init__(self, spec: KernelSpec, config: dict[str, Any] | None = None) -> None:
        self.spec, self.config = spec, config
        self._impl = spec.function()
        self._bind = spec.load(spec.bind) if spec.bind else None
        self._prepare = spec.load(spec.prepare) if spec.prepare else None

    @property
    def prepares(self) -> bool:
        """Return whether the kernel makes a form of its own of a weight, which is kept with the weight."""
        return self._prepare is not None

    def with_config(self, config: dict[str, Any] | None) -> Runner:
        """Return the same kernel with another config."""
        return self if config == self.config else Runner(self.spec, config)

    def __call__(self, x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
        return self.bind(layout, parts, x.dtype)(x, bias)

    def bind(
        self, layout: Layout, parts: Parts, dtype: torch.dtype, memo: dict[Any, Any] | None = None
    ) -> BoundFunction:
        """Return the kernel for this weight; ``memo``: where the weight keeps what kernels prepare from it."""
        if self._prepare is None:
            return self._bound(layout, parts, dtype)
        return _Prepared(self, layout, parts, dtype, {} if memo is None else memo)

    def prepared(self, layout: Layout, parts: Parts, dtype: torch.dtype) -> Parts:
        """Return the weight in the kernel's own form."""
        assert self._prepare is not None
        with torch.no_grad():
            return self._prepare(layout, parts, dtype)

    def _bound(self, layout: Layout, parts: Parts, dtype: torch.dtype) -> BoundFunction:
        options = {} if self.config is None else {"config": self.config}
        if self._bind is not None:
            return self._bind(layout, parts, dtype, **options)
        impl = self._impl
        if options:
            return lambda x, bias: impl(x, layout, parts, bias, **options)
        return lambda x, bias: impl(x, layout, parts, bias)


class _Prepared:
    """Is a kernel bound to its own form of a weight, which is made anew when the weight has been written into."""

    def __init__(self, runner: Runner, layout: Layout, parts: Parts, dtype: torch.dtype, memo: dict[Any, Any]) -> None:
        self.runner, self.layout, self.parts, self.dtype, self.memo = runner, layout, parts, dtype, memo
        self.state: tuple[int, ...] | None = None
        self.run: BoundFunction | None = None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        state = tuple(map(_version, self.parts.values()))
        if state != self.state or self.run is None:
            key = ("prepared", self.runner.spec.name, self.dtype)
            kept = self.memo.get(key)
            if kept is None or kept[0] != state:
                kept = self.memo[key] = (state, self.runner.prepared(self.layout, self.parts, self.dtype))
            self.run = self.runner._bound(self.layout, kept[1], self.dtype)
            self.state = state
        return self.run(x, bias)


def _version(part: Tensor) -> int:
    """Return a number that rises with each write; a tensor made in inference mode counts none."""
    return 0 if part.is_inference() else part._version


class Bound:
    """Is a :class:`Choice` bound to one weight and an input dtype: ``bound(x, bias)`` for x (..., K)."""

    __slots__ = (
        "_decodes",
        "_limits",
        "_memo",
        "_runners",
        "_runs",
        "device",
        "device_type",
        "epoch",
        "features",
        "layout",
        "outputs",
        "parts",
    )

    def __init__(self, choice: Choice, layout: Layout, parts: Parts, memo: dict[Any, Any], epoch: int) -> None:
        self.epoch = epoch
        self.device = next(iter(parts.values())).device
        self.device_type = self.device.type
        self.features, self.outputs = layout.in_features, layout.out_features
        self.layout, self.parts = layout, parts
        # Kept only for kernels that read it: the weight keeps this object there, and a cycle of the two would hold the
        # tensors of a weight that is gone until Python looks for cycles.
        self._memo = memo if any(getattr(runner, "prepares", False) for _, _, runner in choice.steps) else {}
        self._decodes: dict[torch.dtype, DecodeFunction] = {}
        self._limits = [limit for limit, _, _ in choice.steps]
        self._runners = [runner for _, _, runner in choice.steps]
        self._runs: list[BoundFunction | None] = [None] * len(choice.steps)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ W.T + bias``; x and bias of the dtype that was bound, bias (N,) or None."""
        shape = x.shape
        if shape[-1] != self.features:
            raise ValueError(f"the input has {shape[-1]} features, the quantized weight takes {self.features}")
        if x.device != self.device or (bias is not None and bias.device != self.device):
            self._refuse_device(x, bias)
        rank = len(shape)
        flat = x if rank == 2 else x.reshape(-1, self.features)
        m = flat.shape[0]
        if not m:
            return x.new_empty(*shape[:-1], self.outputs)
        if not flat.is_contiguous():
            flat = flat.contiguous()
        i = 0
        for limit in self._limits:
            if m <= limit:
                break
            i += 1
        run = self._runs[i]
        if run is None:
            run = self._runs[i] = _bind(self._runners[i], self.layout, self.parts, x.dtype, self._memo)
        y = run(flat, bias)
        if not y.is_contiguous():
            y = y.contiguous()
        if rank == 2:
            return y
        # No view: autograd lets nobody add in place to a view that a function of ours returned, and adapters do.
        try:
            # Most inputs are batches of sequences; a slice of a shape is an object of its own.
            if rank == 3:
                return y.resize_(shape[0], shape[1], self.outputs)
            return y.resize_(*shape[:-1], self.outputs)
        except RuntimeError:
            # Forward-mode gradients and some subclasses cannot: the same, five times as slow.
            return torch.ops.aten._unsafe_view.default(y, (*shape[:-1], self.outputs))

    def decoding(self, dtype: torch.dtype) -> DecodeFunction:
        """Return ``function(layout, parts, dtype)`` that gives the dense weight in ``dtype``; void with the epoch."""
        found = self._decodes.get(dtype)
        if found is None:
            found = self._decodes[dtype] = decoding(self.layout, self.parts, dtype)
        return found

    def _refuse_device(self, x: Tensor, bias: Tensor | None) -> None:
        name, found = ("input", x) if x.device != self.device else ("bias", bias)
        assert found is not None
        raise UnsupportedError(
            f"the {name} is on {found.device}, the quantized weight on {self.device}: move one of them (x.to(device), "
            "model.to(device))"
        )


def _bind(runner: Any, layout: Layout, parts: Parts, dtype: torch.dtype, memo: dict[Any, Any]) -> BoundFunction:
    if isinstance(runner, Runner):
        return runner.bind(layout, parts, dtype, memo)
    # A plain function (x, layout, parts, bias), as tests and other code put into a choice.
    return lambda x, bias: runner(x, layout, parts, bias)
