"""qhub: every quantization method of Hugging Face transformers as a small installable plugin.

Installing ``qhub-core`` and plugins is all there is to do: ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` find
them. This package is for people who look inside (:func:`explain`), write a method (:mod:`qhub.hookspecs`) or a kernel.

Importing ``qhub`` loads neither torch nor transformers; public names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qhub.hookspecs import hookimpl

if TYPE_CHECKING:
    from qhub.config import ConfigSpec, MethodConfig
    from qhub.errors import QhubError
    from qhub.kernels import explain
    from qhub.modules import QuantLinear
    from qhub.registry import Registry, registry
    from qhub.tensor import QuantizedTensor

__version__ = "0.1.0"

__all__ = [
    "ConfigSpec",
    "MethodConfig",
    "QhubError",
    "QuantLinear",
    "QuantizedTensor",
    "Registry",
    "explain",
    "hookimpl",
    "registry",
]

_HOMES = {
    "ConfigSpec": "qhub.config",
    "MethodConfig": "qhub.config",
    "QhubError": "qhub.errors",
    "QuantLinear": "qhub.modules",
    "QuantizedTensor": "qhub.tensor",
    "Registry": "qhub.registry",
    "explain": "qhub.kernels",
    "registry": "qhub.registry",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module = importlib.import_module(_HOMES[name])
        # A submodule of the same name (qhub.registry) would otherwise shadow the public object after its import.
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'qhub' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
