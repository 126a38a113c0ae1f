"""What another method's numbers become in an AWQ checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qhub.layouts import Layout
from qhub.layouts.affine_settings import affine_settings
from qhub.plan import Adoption, Skip, WeightInfo
from qhub_awq.config import spec
from qhub_awq.plan import layout_of, misfit

__all__ = ["adopt"]


def adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    """Return one config for all of ``layouts``: 4 bits, the finest groups, zeros where any has them.

    ``others``: weights that stay dense; they are listed as not converted. ``options``: config values, which win.
    """
    found = affine_settings(layouts, (4,))
    values = {
        "bits": 4,
        "group_size": found.group_size,
        "zero_point": not found.symmetric,
        "version": "gemm",
        "modules_to_not_convert": [name.removesuffix(".weight") for name in others] or None,
        **options,
    }
    config = spec().parse({**values, "quant_method": "awq"})
    adopted: dict[str, Layout | Skip] = {}
    for name, layout in layouts.items():
        info = WeightInfo(name, layout.out_features, layout.in_features, torch.float16)
        reason = found.misfits.get(name) or misfit(config, info)
        made = layout_of(config, layout.out_features, layout.in_features)
        adopted[name] = made if reason is None else Skip(reason)
    return Adoption(config, adopted)
