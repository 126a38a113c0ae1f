"""qhub: every quantization method of Hugging Face transformers as a small installable plugin.

Installing ``qhub-core`` and plugins is all there is to do: ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``
find them. This package is for people who look inside (:func:`explain`), write a method (:mod:`qhub.hookspecs`) or a
kernel.

Importing ``qhub`` loads neither torch nor transformers; public names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qhub.hookspecs import hookimpl

if TYPE_CHECKING:
    from qhub.config import ConfigSpec, MethodConfig
    from qhub.decoding.optimizing import optimize
    from qhub.errors import QhubError
    from qhub.integrations.peft.loftq import loftq_init
    from qhub.integrations.peft.merging import merge
    from qhub.integrations.transformers.converting import convert
    from qhub.integrations.transformers.quantize import quantize
    from qhub.kernels import explain
    from qhub.kernels.tune import tune
    from qhub.modules import QuantLinear
    from qhub.registry import Registry
    from qhub.registry import registry as plugins
    from qhub.tensor import QuantizedTensor

__version__ = "0.1.0"

__all__ = [
    "ConfigSpec",
    "MethodConfig",
    "QhubError",
    "QuantLinear",
    "QuantizedTensor",
    "Registry",
    "convert",
    "explain",
    "hookimpl",
    "loftq_init",
    "merge",
    "optimize",
    "plugins",
    "quantize",
    "tune",
]

# Where each public name lives: "module:name". A name never equals that of a submodule of this package, whose import
# would replace it.
_HOMES = {
    "ConfigSpec": "qhub.config:ConfigSpec",
    "MethodConfig": "qhub.config:MethodConfig",
    "QhubError": "qhub.errors:QhubError",
    "QuantLinear": "qhub.modules:QuantLinear",
    "QuantizedTensor": "qhub.tensor:QuantizedTensor",
    "Registry": "qhub.registry:Registry",
    "explain": "qhub.kernels.explanation:explain",
    "tune": "qhub.kernels.tune:tune",
    "loftq_init": "qhub.integrations.peft.loftq:loftq_init",
    "convert": "qhub.integrations.transformers.converting:convert",
    "merge": "qhub.integrations.peft.merging:merge",
    "optimize": "qhub.decoding.optimizing:optimize",
    "plugins": "qhub.registry:registry",
    "quantize": "qhub.integrations.transformers.quantize:quantize",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        value = getattr(importlib.import_module(module), attribute)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'qhub' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
