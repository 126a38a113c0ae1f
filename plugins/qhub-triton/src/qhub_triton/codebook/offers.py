"""What this area's kernels say of themselves, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhub.kernels import KernelSpec

__all__ = ["offers"]


def offers() -> list[KernelSpec]:
    """Return the kernels of this area."""
    return []
