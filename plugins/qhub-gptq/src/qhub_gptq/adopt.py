"""What another method's numbers become in a GPTQ checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub.layouts import Affine, Layout
from qhub.layouts.affine_settings import affine_settings
from qhub.plan import Adoption, Skip
from qhub_gptq.config import check, spec
from qhub_gptq.dynamic import BITS, Settings
from qhub_gptq.plan import layout_of

__all__ = ["adopt"]


def adopt(layouts: Mapping[str, Layout], options: Mapping[str, Any]) -> Adoption:
    """Return one config for all of ``layouts``: the widest codes, the finest groups, zeros where any has them.

    Zeros are written as they are (``gptq_v2``) unless all are the middle: the older format cannot say a zero of 0 in a
    way that every reader understands. ``options``: config values, which win.
    """
    found = affine_settings(layouts, BITS)
    values = {
        "bits": found.bits,
        "group_size": found.group_size,
        "sym": found.symmetric,
        "desc_act": found.act_order,
        "format": "gptq" if found.symmetric else "gptq_v2",
        **options,
    }
    config = spec().parse({**values, "quant_method": "gptq"})
    check(config)
    settings = Settings(
        bits=config.bits, group_size=config.group_size, sym=bool(config.sym), desc_act=bool(config.desc_act)
    )
    adopted: dict[str, Layout | Skip] = {}
    for name, layout in layouts.items():
        if name in found.misfits:
            adopted[name] = Skip(found.misfits[name])
            continue
        assert isinstance(layout, Affine)
        made = layout_of(settings, layout.out_features, layout.in_features)
        adopted[name] = made if layout.transforms else _plain(made)
    return Adoption(config, adopted)


def _plain(layout: Affine) -> Affine:
    from dataclasses import replace

    # A file says of each layer in which order its columns are: those without an order of their own keep the plain one.
    return replace(layout, transforms=())
