"""The one exception tree of qhub.

::

    QhubError
    ├── PluginError            a plugin is missing, broken, disabled, or clashes with another
    │   └── UnknownMethodError no installed plugin serves this quantization method
    ├── ConfigError            a quantization config holds an unknown key or an impossible value
    ├── CheckpointError        a file or tensor on disk is not what its config says
    ├── LayoutError            tensors do not fit the layout that is to hold them
    ├── LossError              numbers cannot be said on another layout without changing them
    ├── KernelError            a forced kernel cannot run here, or a kernel disagrees with the reference
    └── UnsupportedError       the operation has no meaning for a quantized weight

Every message says what was asked, what was found, what to do, and names the tensor, file or package.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "KernelError",
    "LayoutError",
    "LossError",
    "PluginError",
    "QhubError",
    "UnknownMethodError",
    "UnsupportedError",
]


class QhubError(Exception):
    """Is the base of every error that qhub raises on purpose."""


class PluginError(QhubError):
    """Says that a plugin could not be found, loaded or used."""


class UnknownMethodError(PluginError):
    """Says that no installed plugin serves a quantization method, and which package to install."""


class ConfigError(QhubError, ValueError):
    """Says that a quantization config has an unknown key or a value its method does not offer."""


class CheckpointError(QhubError):
    """Says which file or tensor of a checkpoint is missing, surplus, truncated or of the wrong shape."""


class LayoutError(QhubError, ValueError):
    """Says which tensor does not fit its layout, what was found and what was expected."""


class LossError(QhubError):
    """Says why the numbers of one layout cannot be written on another without a loss."""


class KernelError(QhubError):
    """Says that a kernel was asked for by name and cannot run, or that it gave a wrong result."""


class UnsupportedError(QhubError):
    """Says that an operation cannot be done on a quantized weight, and what can be done instead."""
