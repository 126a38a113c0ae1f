"""Kernels made up by tests, and weights to multiply with them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qhub import hookimpl
from qhub.kernels import KernelSpec, dispatch, reference
from qhub.layouts import Affine, Grid
from qhub.registry import registry
from qhub.testing import threads

NAME = "kernels-under-test"


class Calls:
    """Is a module of kernels that are right, and remembers who ran: (kernel, M, config)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, Any]] = []
        self.bound: list[str] = []

    def kernel(self, name: str) -> Callable[..., torch.Tensor]:
        def run(x, layout, parts, bias=None, config=None):
            self.seen.append((name, x.shape[0], config))
            return reference.linear(x, layout, parts, bias)

        return run

    def binder(self, name: str) -> Callable[..., Any]:
        def bind(layout, parts, dtype, config=None):
            self.bound.append(name)

            def run(x, bias):
                # What kernels are promised.
                assert x.dim() == 2 and x.is_contiguous() and x.dtype == dtype and x.shape[0] > 0
                assert bias is None or bias.dtype == dtype
                self.seen.append((name, x.shape[0], config))
                return reference.linear(x, layout, parts, bias)

            return run

        return bind


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[Any]:
    """An empty cache folder."""
    monkeypatch.setenv("QHUB_CACHE", str(tmp_path))
    monkeypatch.delenv("QHUB_KERNEL", raising=False)
    dispatch.forget()
    yield tmp_path
    dispatch.forget()


@pytest.fixture
def offer(cache, monkeypatch) -> Iterator[Callable[..., Calls]]:
    """A function that makes the given kernels the only ones: {name: fields of its KernelSpec}.

    ``impl``, ``bind`` and the like that are functions are put where a path can name them.
    """
    monkeypatch.setattr(registry, "broadcast", _without_others(registry.broadcast))

    def make(**kernels: dict[str, Any]) -> Calls:
        calls = Calls()
        module = types.ModuleType("kernels_under_test")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        specs = []
        for name, fields in kernels.items():
            fields = {"layout": "affine", **fields}
            fields.setdefault("impl", calls.kernel(name))
            if fields.get("bind") is True:
                fields["bind"] = calls.binder(name)
            for key, value in list(fields.items()):
                if callable(value):
                    setattr(module, f"{name}_{key}", value)
                    fields[key] = f"{module.__name__}:{name}_{key}"
            specs.append(KernelSpec(name=name, **fields))
        registry.register(_Offer(specs), NAME, group="qhub.kernels")
        dispatch.forget()
        return calls

    yield make
    if NAME in registry.list("qhub.kernels"):
        registry.unregister(NAME, group="qhub.kernels")


class _Offer:
    def __init__(self, specs: list[KernelSpec]) -> None:
        self.specs = specs

    @hookimpl
    def qhub_kernels(self):
        return self.specs


def _without_others(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def only(hook: str, *args: Any, **kwargs: Any) -> Any:
        return [(name, found) for name, found in broadcast(hook, *args, **kwargs) if name == NAME]

    return only


def affine(n: int = 48, k: int = 64, seed: int = 0) -> tuple[Affine, dict[str, torch.Tensor]]:
    """Return a 4-bit layout and parts of random numbers."""
    layout = Affine(out_features=n, in_features=k, bits=4, grid=Grid.along_k(32), zero_point=8.0)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    return layout, {"qweight": layout.pack_codes(codes), "scales": torch.rand(n, k // 32, generator=generator) + 0.5}
