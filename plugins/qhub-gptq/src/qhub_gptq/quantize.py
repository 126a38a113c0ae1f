"""One weight and the statistics of its input to the parts of its layout: order, solver, quality option."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Affine, Layout
from qhub_gptq.grids import Codes, ranged, searched
from qhub_gptq.hessian import Damping, Order, damped, feature_order, prepare, unit_factor
from qhub_gptq.order import group_index
from qhub_gptq.refine import refine
from qhub_gptq.solver import solve

__all__ = ["Options", "quantize"]

# Coordinate descent over all codes: on a language model of 26 M parameters, the error falls by 6.2, 2.4, 1.2 and 0.7 %
# in the first four sweeps at 3 bits, by 8.7, 3.1, 1.5, 0.8 and 0.5 % in the first five at 2.
_SWEEPS = 5
# How far the target goes from the weight itself (0) to what best gives the unquantized model's outputs (1): what fits
# the sample best is not what fits other text best. Perplexity of the same model, 32 windows of 512 tokens: 4 bits 6.589
# (0), 6.515 (0.5); 3 bits 8.251 (0), 8.121 (0.5); 2 bits 15.73 (0.5), 18.06 (1).
_CROSS = 0.5
_CROSS_DAMPING = 0.01


@dataclass(frozen=True)
class Options:
    """Says how to solve. ``order``: in which features are taken; ``static_groups``: scales are chosen before, from the
    untouched weights; ``damping``; ``search``: scales cost least under the Hessian's diagonal, instead of spanning the
    range; ``high``: the quality option."""

    order: Order = "natural"
    static_groups: bool = False
    damping: Damping = field(default_factory=lambda: Damping(0.05, 0.01))
    search: bool = False
    high: bool = False


@torch.no_grad()
def quantize(weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    """Return the parts of ``layout`` for ``weight`` (N, K) of any float dtype: qweight, scales, zeros, in_perm.

    ``statistics``: ``hessian`` (K, K), and ``cross`` (K, K) or none. Scales are float16, zeros uint8. Raises
    :class:`LayoutError` when weight or Hessian are not finite; warns where the Hessian does not factor, and rounds to
    nearest then.
    """
    assert isinstance(layout, Affine)
    if tuple(weight.shape) != (layout.out_features, layout.in_features):
        raise LayoutError(
            f"a weight of {tuple(weight.shape)} for a layout of {layout.out_features}x{layout.in_features}"
        )
    codes, group = Codes(layout.bits, layout.zero == "constant"), layout.grid.cols
    # Embeddings have none: nothing that a feature rounds off can be made up for by another.
    hessian = statistics.get("hessian")
    hessian = prepare(torch.eye(layout.in_features, device=weight.device) if hessian is None else hessian)
    target = weight.detach().float().t().contiguous()
    largest = target.abs().amax()
    # float16 holds scales up to 65504; the widest grid is twice the largest weight.
    if not bool(torch.isfinite(largest)) or float(largest) > 32000 * codes.largest:
        raise LayoutError(
            f"the weight of {layout.out_features}x{layout.in_features} to quantize holds {float(largest):g}: NaN, "
            "infinity, or more than a float16 scale can reach"
        )
    if "cross" in statistics:
        shift = statistics["cross"].float() - statistics["hessian"].float()
        target = _retargeted(target, hessian, shift)
    permuted = bool(layout.transforms)
    order = feature_order(hessian.diagonal(), group, options.order)
    if order is None:
        order = torch.arange(layout.in_features, device=target.device)
    found, scales, zeros = _solved(target, hessian, order, group, codes, options, permuted)
    # Where the columns of the stored matrix come from: in act-order, groups are runs of the order they were solved in.
    source = torch.arange(layout.in_features, device=target.device)
    if permuted:
        source = torch.argsort(group_index(order.to(torch.int32), order.shape[0], group, order.device), stable=True)
    found = found[torch.argsort(order)[source]]
    if options.high:
        damping = damped(hessian, options.damping.percent / 5)[source][:, source]
        refine(target[source], damping, found, scales, zeros, group, codes.largest, _SWEEPS)
    spread = torch.arange(layout.in_features, device=target.device) // group
    parts = {
        "qweight": layout.pack_codes((found + zeros[spread]).t().contiguous()),
        "scales": scales.t().to(torch.float16).contiguous(),
    }
    if layout.zero == "value":
        parts["zeros"] = zeros.t().to(torch.uint8).contiguous()
    if permuted:
        parts["in_perm"] = source.to(torch.int32)
    return parts


def _solved(
    target: Tensor, hessian: Tensor, order: Tensor, group: int, codes: Codes, options: Options, permuted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes less zero (K, N) in ``order``, scales and zeros (G, N) in the order of the layout's groups."""
    sorted_hessian = hessian[order][:, order]
    factor = unit_factor(sorted_hessian, options.damping)
    if factor is None:
        warnings.warn(
            f"the Hessian of {hessian.shape[0]} input features cannot be factored, with whatever damping: the weights "
            "are rounded to nearest. Calibrate with more samples",
            stacklevel=3,
        )
        factor = torch.eye(hessian.shape[0], device=hessian.device)

    def choose(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        return searched(weight, importance, codes) if options.search or options.high else ranged(weight, codes)

    importance = sorted_hessian.diagonal()
    if options.static_groups or (options.order == "features" and not permuted):
        plain = hessian.diagonal()
        pairs = [
            choose(target[start : start + group], plain[start : start + group])
            for start in range(0, target.shape[0], group)
        ]
        fixed = torch.stack([scale for scale, _ in pairs]), torch.stack([zero for _, zero in pairs])
        return solve(target[order], factor, group, codes.largest, (order // group).tolist(), fixed)
    found, scales, zeros = solve(
        target[order], factor, group, codes.largest, lambda weight, a, b: choose(weight, importance[a:b])
    )
    if not permuted:
        # Groups may have been taken in another order than they lie in.
        back = torch.argsort(order[::group] // group)
        scales, zeros = scales[back], zeros[back]
    return found, scales, zeros


def _retargeted(target: Tensor, hessian: Tensor, shift: Tensor) -> Tensor:
    """Return (K, N) what the weight should be so that the quantized model's inputs give the unquantized one's outputs.

    The minimum of ``|W X_float - W' X|^2 + lambda |W - W'|^2`` is ``W' = W (C + lambda) (H + lambda)^-1`` with ``C``
    the mean of ``x_float x^t`` (Li et al. 2025, "GPTAQ", section 3; Zhang et al. 2025, "Qronos"): W moves by ``W (C -
    H) (H + lambda)^-1``, of which half is taken, see ``_CROSS``. ``shift``: C - H, both as they were measured. Raises
    :class:`LayoutError` when it is not finite.
    """
    if not bool(torch.isfinite(shift).all()):
        raise LayoutError(
            f"the products of {shift.shape[0]} input features with the unquantized model's hold NaN or infinity: "
            "activations overflow. Calibrate in bfloat16 or float32, or look for the sample that does it"
        )
    lower, info = torch.linalg.cholesky_ex(damped(hessian, _CROSS_DAMPING))
    if int(info) != 0:
        # The solver says so: the Hessian is none.
        return target
    return torch.add(target, torch.cholesky_solve(shift.t() @ target, lower), alpha=_CROSS)
