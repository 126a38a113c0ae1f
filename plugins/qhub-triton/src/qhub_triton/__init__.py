"""Kernels for GPUs: products with quantized weights in portable Triton. No method is named here.

tiled/     affine, lookup and float8 codes in tiles: few rows of input to thousands
wide/      the same tiles, many rows of input on Hopper
codebook/  vectors picked by wide codes, rotations
eightbit/  inputs rounded to float8 or int8
dense/     any layout to its dense weight, for many rows and for gradients
grouped/   fused experts, one launch for all of them
decoding/  the small operations of a decode step
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from qhub import hookimpl

if TYPE_CHECKING:
    from qhub.kernels import KernelSpec

_AREAS = ("tiled", "wide", "codebook", "eightbit", "dense")


@hookimpl
def qhub_kernels() -> Iterable[KernelSpec]:
    """Offer the kernels of every area."""
    return [spec for area in _AREAS for spec in import_module(f"qhub_triton.{area}.offers").offers()]


@hookimpl
def qhub_decoding(device: str) -> Mapping[str, str] | None:
    """Offer the operations of a decode step."""
    return import_module("qhub_triton.decoding.offers").offers(device)


@hookimpl
def qhub_experts(device: str) -> str | None:
    """Offer grouped products for fused experts."""
    return "qhub_triton.grouped.experts:experts_forward" if device == "cuda" else None
