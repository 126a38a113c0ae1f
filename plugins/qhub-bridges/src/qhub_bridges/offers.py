"""The kernels as data. What is guessed of their speed was measured on one H100 (torch 2.11, triton 3.6)."""

from __future__ import annotations

from dataclasses import replace

from qhub.kernels import KernelSpec
from qhub.kernels.spec import Cost

__all__ = ["offers"]

_HALVES = frozenset({"bfloat16", "float16"})
_CUDA = frozenset({"cuda"})


def offers() -> list[KernelSpec]:
    """Return the kernels; those that take affine codes also take them in tiles, under a name of its own."""
    affine = [
        _spec(
            "tinygemm",
            "tinygemm",
            devices=frozenset({"cuda", "cpu"}),
            dtypes=frozenset({"bfloat16", "float16", "float32"}),
            bits=frozenset({4}),
            packages=("torch",),
            cost=Cost(bandwidth=0.5, rate=0.04, tile=8, passes=4),
        ),
        _spec(
            "marlin",
            "marlin",
            devices=_CUDA,
            dtypes=_HALVES,
            bits=frozenset({4, 8}),
            packages=("gptqmodel",),
            cost=Cost(bandwidth=0.55, rate=0.45, tile=16, launch=5e-6),
        ),
        _spec(
            "machete",
            "machete",
            devices=_CUDA,
            dtypes=_HALVES,
            bits=frozenset({4, 8}),
            packages=("gptqmodel",),
            cost=Cost(bandwidth=0.4, rate=0.85, tile=16, launch=8e-6),
        ),
        _spec(
            "gemlite",
            "gemlite_linear",
            devices=_CUDA,
            dtypes=_HALVES,
            bits=frozenset({1, 2, 4, 8}),
            packages=("gemlite", "triton"),
            probes=(1, 16, 128),
            cost=Cost(bandwidth=0.4, rate=0.3, tile=16, launch=5e-6),
        ),
    ]
    found = [*affine, *map(_tiled, affine)]
    bnb4 = _spec(
        "bitsandbytes-4bit",
        "bnb4",
        layout="lookup",
        devices=frozenset({"cuda", "cpu", "xpu"}),
        dtypes=frozenset({"bfloat16", "float16", "float32"}),
        bits=frozenset({4}),
        packages=("bitsandbytes",),
        probes=(1, 3, 33),
        cost=Cost(bandwidth=0.3, rate=0.3, tile=1, passes=4, launch=5e-6),
    )
    found += [bnb4, _tiled(bnb4)]
    found.append(
        _spec(
            "bitsandbytes-int8",
            "bnb8",
            devices=frozenset({"cuda", "cpu"}),
            dtypes=_HALVES,
            bits=frozenset({8}),
            activations=frozenset({"int8"}),
            packages=("bitsandbytes",),
            cost=Cost(bandwidth=0.5, rate=0.4, unit="byte", launch=400e-6),
        )
    )
    return found


def _tiled(spec: KernelSpec) -> KernelSpec:
    """Return the same kernel for weights in tiles, which only GPUs want."""
    return replace(spec, name=f"{spec.name}-tiled", layout="tiled", devices=spec.devices - {"cpu"})


def _spec(name: str, module: str, layout: str = "affine", **fields: object) -> KernelSpec:
    path = f"qhub_bridges.{module}"
    return KernelSpec(
        name=name,
        impl=f"{path}:linear",
        bind=f"{path}:bind",
        prepare=f"{path}:prepare",
        accepts=f"{path}:accepts",
        layout=layout,
        **fields,  # type: ignore[arg-type]
    )
