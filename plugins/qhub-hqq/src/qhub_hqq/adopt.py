"""What another method's numbers become in an HQQ checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts import Layout
from qhub.layouts.affine_settings import affine_settings
from qhub.plan import Adoption, Skip
from qhub_hqq.config import spec
from qhub_hqq.settings import settings_of

__all__ = ["adopt"]

_WIDTHS = (1, 2, 3, 4, 8)


def adopt(layouts: Mapping[str, Layout], options: Mapping[str, Any]) -> Adoption:
    """Return one config for all of ``layouts``: the widest codes and the finest groups along rows.

    HQQ's zeros are floats, so every whole zero fits. Its formula is computed in the dtype of scales and zeros; the
    numbers themselves stay what they are. ``options``: config values, which win.
    """
    found = affine_settings(layouts, _WIDTHS)
    group = None if found.group_size == -1 else found.group_size
    values = {"nbits": found.bits, "group_size": group, "axis": 1, **options}
    config = spec().parse({**values, "quant_method": "hqq"})
    settings = settings_of(config)[None]
    adopted: dict[str, Layout | Skip] = {}
    for name, layout in layouts.items():
        if name in found.misfits:
            adopted[name] = Skip(found.misfits[name])
            continue
        try:
            adopted[name] = settings.layout(layout.out_features, layout.in_features, name.removesuffix(".weight"))
        except ConfigError as error:
            adopted[name] = Skip(str(error))
    return Adoption(config, adopted)
