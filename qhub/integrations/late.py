"""Does something to a module once it is imported as a whole: wraps a function of it, or calls a function with it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

__all__ = ["when_complete", "wrap_when_imported"]

_waiting: dict[str, list[Callable[[ModuleType], None]]] = {}


def wrap_when_imported(module: str, method: str, wrapper: Any) -> None:
    """Wrap ``"Class.method"``, or a ``"function"``, of ``module`` once, now or when it is imported.

    ``wrapper``: called with (original, instance, args, kwargs), as wrapt does. A name that the module does not have, in
    this version, is left out.
    """
    owner, _, name = method.rpartition(".")

    def wrap(found: ModuleType) -> None:
        holder = getattr(found, owner) if owner else found
        original = vars(holder).get(name)
        if original is not None and not isinstance(original, wrapt.FunctionWrapper):
            wrapt.wrap_function_wrapper(found, method, wrapper)

    wrapt.register_post_import_hook(lambda found: when_complete(found, wrap), module)


def when_complete(module: ModuleType, callback: Callable[[ModuleType], None]) -> None:
    """Call ``callback`` with ``module``, at its first use if its import is still under way.

    Modules that import torch in their first lines are half made when torch's import brings qhub in.
    """
    if getattr(module.__spec__, "_initializing", False):
        _waiting.setdefault(module.__name__, []).append(callback)
        module.__class__ = _Incomplete
    else:
        callback(module)


class _Incomplete(ModuleType):
    """Is a module in the middle of its import: finished at its first use (like importlib.util.LazyLoader)."""

    def __getattribute__(self, name: str) -> Any:
        get = super().__getattribute__
        if not name.startswith("__") and not getattr(get("__spec__"), "_initializing", False):
            self.__class__ = ModuleType  # type: ignore[assignment]
            for callback in _waiting.pop(get("__name__"), []):
                callback(self)
        return get(name)
