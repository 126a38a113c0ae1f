"""Lets a grouped product run only where it gives what each expert's dense weight gives: tried once for each layout."""

from __future__ import annotations

import torch

from qhub.kernels.dense import dense
from qhub.layouts import Layout, Parts
from qhub_triton.grouped.product import Product
from qhub_triton.grouped.routing import Routes, routed

__all__ = ["disagreement"]

# Relative errors up to which results count as equal, as where kernels for single matrices are admitted.
_TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}

_found: dict[tuple[Layout, torch.dtype, torch.device, int, bool, int], str | None] = {}


def disagreement(product: Product, parts: Parts, block: int, single: bool, per: int) -> str | None:
    """Return how the product differs from two experts' dense weights on random input; None: it does not.

    ``block``, ``single``: of the routes; ``per``: as for :class:`Product`. Asks the device, the first time; while a
    graph is captured nothing can be asked.
    """
    key = (product.layout, product.dtype, product.device, block, single, per)
    if key not in _found:
        if product.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        _found[key] = _tried(product, parts, block, single, per)
    return _found[key]


@torch.no_grad()
def _tried(product: Product, parts: Parts, block: int, single: bool, per: int) -> str | None:
    device, dtype, layout = product.device, product.dtype, product.layout
    chosen = [0, product.experts - 1]
    numbers = [chosen[i % 2] for i in range(3 * max(per, 1))]
    ids = torch.tensor(numbers, device=device)
    # The router's order, sorted by expert where the routes sort.
    order = list(range(len(numbers))) if single else sorted(range(len(numbers)), key=numbers.__getitem__)
    generator = torch.Generator().manual_seed(0)
    rows = len(numbers) // per if per else len(numbers)
    x = torch.randn(rows, product.k, generator=generator).to(device, dtype)
    if single:
        cut = Routes(ids, ids, ids, ids, ids, len(numbers), block, True)
    else:
        cut = routed(ids, product.experts, block)
    y = product(x, cut, per)
    error = norm = 0.0
    specs = layout.part_specs()
    for expert in sorted(set(numbers)):
        own = {name: part[expert] if specs[name].batched else part for name, part in parts.items()}
        places = [place for place, pair in enumerate(order) if numbers[pair] == expert]
        source = [order[place] // per if per else place for place in places]
        wanted = torch.nn.functional.linear(x[source], dense(layout, own, dtype)).double()
        error += float((y[places].double() - wanted).square().sum())
        norm += float(wanted.square().sum())
    relative = (error / max(norm, 1e-60)) ** 0.5
    if relative <= _TOLERANCE[dtype]:
        return None
    return f"a grouped product differs from the experts' dense weights by {relative:.1e}"
