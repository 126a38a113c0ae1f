"""gptqmodel's compiled extensions, and what its kernels for symmetric codes have in common.

gptqmodel compiles an extension on the user's machine when it first needs it: minutes, with nvcc. qhub takes one that
has been compiled before; it starts the compiler only where ``QHUB_KERNEL`` names the kernel. Source: gptqmodel 7.7
``extension.py`` and ``utils/cpp.py``.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from qhub.layouts import Affine, Layout
from qhub_bridges.terms import affine_of, grouping_refusal

__all__ = ["missing", "symmetric_refusal", "type_id", "words_along_k"]


def missing(kernel: str, name: str) -> str | None:
    """Return why gptqmodel's extension ``name`` cannot be used for ``kernel``; None when it can, and is loaded."""
    if importlib.util.find_spec("gptqmodel") is None:
        return "gptqmodel is not installed"
    try:
        from gptqmodel import extension
    except ImportError as error:
        return f"gptqmodel cannot be imported: {error}"
    try:
        held = extension._EXTENSION_SPECS_BY_NAME[name].resolve()
        compiled = held._ops_available() or any(held.base_build_root().glob("**/*.so"))
    except (AttributeError, KeyError) as error:
        return f"this gptqmodel keeps its extensions otherwise than 7.7 does ({type(error).__name__}: {error})"
    if not compiled and os.environ.get("QHUB_KERNEL") != kernel:
        return f"gptqmodel has not compiled it here: QHUB_KERNEL={kernel} makes it, in minutes"
    if not extension.load(name=name)[name]:
        return f"gptqmodel could not load it: {extension.error(name)}"
    return None


def symmetric_refusal(layout: Layout, groups: frozenset[int]) -> str | None:
    """Return why ``layout`` is not of 4- or 8-bit codes around their middle in ``groups``; None: it is."""
    own = affine_of(layout)
    if not isinstance(own, Affine) or own.bits not in (4, 8):
        return f"takes affine codes of 4 and 8 bits, not {own.kind}"
    reason = grouping_refusal(own, groups | {own.in_features})
    if reason is not None:
        return reason
    middle = 2.0 ** (own.bits - 1)
    if own.zero != "constant" or own.zero_point != middle:
        return f"takes codes around {middle:.0f}, without zeros of their own"
    return None


def type_id(bits: int) -> int:
    """Return gptqmodel's number for codes around their middle."""
    from gptqmodel.utils.marlin_scalar_type import scalar_types

    return (scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128).id


def words_along_k(q: Tensor, bits: int) -> Tensor:
    """Return codes (N, K) as words (K * bits / 32, N) int32: neighbours along K in one, the first lowest (GPTQ)."""
    per_word = 32 // bits
    n, k = q.shape
    columns = q.t().reshape(k // per_word, per_word, n)
    words = torch.zeros(k // per_word, n, dtype=torch.int32, device=q.device)
    for index in range(per_word):
        words |= columns[:, index].to(torch.int32) << (bits * index)
    return words
