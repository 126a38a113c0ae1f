"""Wraps a function or method of a module that may not be imported yet."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

__all__ = ["wrap_when_imported"]


def wrap_when_imported(module: str, method: str, wrapper: Any) -> None:
    """Wrap ``"Class.method"``, or a ``"function"``, of ``module`` once, now or when it is imported.

    ``wrapper``: called with (original, instance, args, kwargs), as wrapt does.
    """
    owner, _, name = method.rpartition(".")

    def wrap(found: ModuleType) -> None:
        holder = getattr(found, owner) if owner else found
        if not isinstance(vars(holder)[name], wrapt.FunctionWrapper):
            wrapt.wrap_function_wrapper(found, method, wrapper)

    wrapt.register_post_import_hook(wrap, module)
