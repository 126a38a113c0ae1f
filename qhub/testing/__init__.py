"""Gives tests what they need to exercise qhub and its plugins: servers, environments and conformance checks.

:class:`MethodConformance` is the kit that an author's test class inherits. It needs pytest (``pip install
qhub-core[testing]``), so it is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qhub.testing.conformance import MethodConformance

__all__ = ["MethodConformance"]


def __getattr__(name: str) -> Any:
    if name == "MethodConformance":
        import pytest

        # Without this a failed assertion of the kit would show no values.
        pytest.register_assert_rewrite("qhub.testing.conformance")
        value = importlib.import_module("qhub.testing.conformance").MethodConformance
        globals()[name] = value
        return value
    raise AttributeError(f"module 'qhub.testing' has no attribute {name!r}")
