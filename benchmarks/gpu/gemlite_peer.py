"""gemlite with the configurations it ships for the H100; shapes without any take those of the nearest shape."""

from __future__ import annotations

import ast
import copy
import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import GROUP, Case, Contestant, Prepared, copies_of

__all__ = ["CONTESTANTS", "complete_configurations"]

# How gemlite's configurations call 8-bit weights with inputs of int8 and of float8.
_INT8, _FLOAT8 = 408, 308


def complete_configurations(config: dict[str, dict[str, Any]], shapes: list[tuple[int, int]], rows: list[int]) -> int:
    """Add to ``config`` {kernel: {"(M, N, K, group, packed, type)": settings}} what is lacking; return how many.

    Lacking are ``shapes`` and ``rows``: they take the settings of the nearest N * K, then the nearest M, of the same
    group and type; a group of the whole row counts as equal. float8 inputs take those of int8. Otherwise gemlite would
    tune itself on the first call.
    """
    added = 0
    for entries in config.values():
        known = {ast.literal_eval(key): value for key, value in entries.items()}
        kinds = {(_group(key), key[4], key[5]) for key in known}
        for group, packed, kind in kinds:
            like = [key for key in known if (_group(key), key[4], key[5]) == (group, packed, kind)]
            wanted_rows = sorted({key[0] for key in like} | set(rows))
            for (n, k), m in itertools.product(shapes, wanted_rows):
                near = min(like, key=lambda key: (_ratio(key[1] * key[2], n * k), _ratio(key[0], m), key))
                for own in (kind, _FLOAT8) if kind == _INT8 else (kind,):
                    wanted = str((m, n, k, group or k, packed, own))
                    if wanted not in entries:
                        entries[wanted] = known[near]
                        added += 1
    return added


def _group(key: tuple[int, ...]) -> int:
    """Return the group of a configuration; 0 for the whole row."""
    return 0 if key[3] == key[2] else key[3]


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


_ready = False


def _gemlite() -> Any:
    global _ready
    import gemlite
    from gemlite import core

    if not _ready:
        from benchmarks.gpu.cells import ROWS, SHAPES

        complete_configurations(core.GEMLITE_TRITON_CONFIG_CACHE, list(SHAPES), list(ROWS))
        _ready = True
    return gemlite


def _prepared(case: Case, layer: Any, dense: Any, rounded: Any = None) -> Prepared:
    nbytes = sum(t.nbytes for t in (layer.W_q, layer.scales, layer.zeros) if isinstance(t, Tensor))
    copies = copies_of(nbytes, lambda: copy.deepcopy(layer))
    return Prepared(lambda x, i: copies[i](x), len(copies), nbytes, dense, rounded)


def _a16w4(case: Case) -> Prepared:
    gemlite = _gemlite()
    q, scales = case.int4
    flat = scales.to(torch.bfloat16).reshape(-1, 1)
    layer = gemlite.helper.A16W4_HQQ_INT(device=case.device, dtype=torch.bfloat16).from_weights(
        q.clone(), flat, torch.full_like(flat, 8.0)
    )
    return _prepared(case, layer, lambda: case.dense_of(q, scales, 8.0))


def _a8w8(kind: str) -> Any:
    def prepare(case: Case) -> Prepared:
        from benchmarks.gpu.peers import _rounded

        gemlite = _gemlite()
        maker = gemlite.helper.A8W8_int8_dynamic if kind == "int8" else gemlite.helper.A8W8_fp8_dynamic
        layer = maker(device=case.device, dtype=torch.bfloat16).from_weights(case.weight.clone())
        codes, scales = layer.W_q, layer.scales

        def dense() -> Tensor:
            return codes.t().float() * scales.reshape(-1, 1).float()

        return _prepared(case, layer, dense, _rounded("int8" if kind == "int8" else "float8"))

    return prepare


_NOTE = "gemlite 0.6.0.post2, its own configurations; those of the nearest shape where it ships none"
CONTESTANTS = [
    Contestant("gemlite_a16w4", "int4", _a16w4, limit=0.06, note=f"{_NOTE}; groups of {GROUP}"),
    Contestant("gemlite_a8w8_int8", "int8_dynamic", _a8w8("int8"), limit=0.06, note=_NOTE),
    Contestant("gemlite_a8w8_fp8", "fp8_dynamic", _a8w8("fp8"), limit=0.06, note=_NOTE),
]
