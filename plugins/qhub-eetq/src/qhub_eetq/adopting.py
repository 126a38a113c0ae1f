"""What another method's numbers become in an EETQ file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import EetqConfig

from qhub.layouts import Layout
from qhub.plan import Adoption, Skip
from qhub_eetq.config import check
from qhub_eetq.plan import int8_rows, unfit

__all__ = ["adopt"]


def adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    """Return int8 rows for each of ``layouts``: the only layout that EETQ has.

    Symmetric codes of up to 8 bits under one scale a row (LLM.int8(), torchao's int8) fit as they are where float16
    holds the scales; narrower scale groups do not. ``others``: weights that stay dense; transformers' EETQ has to be
    told of them. ``options``: values of transformers' EetqConfig, which win. Raises
    :class:`qhub.errors.ConfigError` for values that it does not take.
    """
    dense = [name.removesuffix(".weight") for name in others]
    config = EetqConfig(**{"modules_to_not_convert": dense or None, **options})
    check(config)
    found: dict[str, Layout | Skip] = {}
    for name, layout in layouts.items():
        reason = unfit(layout.out_features, layout.in_features)
        found[name] = int8_rows(layout.out_features, layout.in_features) if reason is None else Skip(reason)
    return Adoption(config, found)
