"""Says whether the bitsandbytes package is here, and what it would add."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from qhub.reports import Finding

__all__ = ["findings"]


def findings() -> list[Finding]:
    """Return one finding about the optional bitsandbytes package; it is not imported."""
    subject = "bitsandbytes"
    if importlib.util.find_spec("bitsandbytes") is None:
        return [
            Finding(
                "ok",
                subject,
                "the bitsandbytes package is not installed and not needed: quantizing, loading, saving and "
                "training work without it",
                "for its 8-bit optimizers, or to hand the method back to it with QHUB_NATIVE=bitsandbytes: pip "
                "install 'qhub-bitsandbytes[bridge]'",
            )
        ]
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        found = "of unknown version"
    return [
        Finding(
            "ok",
            subject,
            f"the bitsandbytes package {found} is installed; qhub does not use it, QHUB_NATIVE=bitsandbytes hands "
            "the method back to it",
        )
    ]
