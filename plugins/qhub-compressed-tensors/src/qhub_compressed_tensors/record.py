"""What a config has to say of a file that is being written, so that upstream finds in it what is there.

A config that asked for quantizing names modules as the model does, and says nothing of what the model itself left
alone: the output head, experts' routers, modules that must stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qhub.layouts import Layout
from qhub_compressed_tensors.config import schemes_of
from qhub_compressed_tensors.layout import layout_of
from qhub_compressed_tensors.matching import matching_pattern, scheme_for
from qhub_compressed_tensors.scheme import Scheme

__all__ = ["record"]


def record(config: Any, stored: Mapping[str, Layout], dense: Sequence[str]) -> None:
    """Change ``config`` where it does not say what a file holds; a config that does stays as it is.

    ``stored``: the layouts of quantized matrices by their module's name in the file; ``dense``: names of other modules
    that upstream could take for targets.
    """
    schemes = schemes_of(config)
    ignore = list(config.ignore or [])
    wrong = {matching_pattern(name, ignore) for name in stored} - {None}
    if wrong:
        # A pattern that left modules of the model alone means others in the file.
        ignore = [pattern for pattern in ignore if pattern not in wrong]
    moved: dict[str, list[str]] = {}
    for name, layout in stored.items():
        found = scheme_for(name, schemes)
        if found is None or not _holds(found, layout, name):
            better = next((scheme for scheme in schemes if _holds(scheme, layout, name)), None)
            if better is not None:
                moved.setdefault(better.name, []).append(name)
    # By their whole names, which go before expressions and classes.
    for group, names in moved.items():
        targets = config.config_groups[group]["targets"]
        config.config_groups[group]["targets"] = [*targets, *(one for one in names if one not in targets)]
    schemes = schemes_of(config)
    for name in dense:
        if matching_pattern(name, ignore) is None and scheme_for(name, schemes) is not None:
            ignore.append(name)
    if ignore != list(config.ignore or []) or config.ignore is None:
        config.ignore = ignore


def _holds(scheme: Scheme, layout: Layout, name: str) -> bool:
    """Return whether ``scheme`` describes ``layout``; the order of features is the file's own affair."""
    planned = layout_of(scheme, layout.out_features, layout.in_features, name)
    sizes = [getattr(one, "grid", None) and one.grid.scale_shape(layout.out_features, layout.in_features)  # type: ignore[attr-defined]
             for one in (planned, layout)]  # fmt: skip
    same = ("kind", "bits", "signed", "zero", "activation")
    return sizes[0] == sizes[1] and type(planned) is type(layout) and all(
        getattr(planned, field, None) == getattr(layout, field, None) for field in same
    )  # fmt: skip
