"""The door: what ``import torch`` calls so that a process importing only transformers has every installed method.

torch calls the entry points of its group ``torch.backends`` at the end of its own import. :func:`arm` only asks to be
told when transformers' quantizer table, or PEFT, are imported; nothing of qhub that imports torch is loaded
before. It never raises: a broken qhub must not break ``import torch``. ``QHUB_AUTOLOAD=0`` turns it off.
"""

from __future__ import annotations

import os
import sys
import warnings
from types import ModuleType

__all__ = ["arm"]

# modeling_utils finishes after quantizers.auto; it is the second chance when torch itself is imported from within
# quantizers.auto, whose table is then not there yet.
_TARGETS = ("transformers.quantizers.auto", "transformers.modeling_utils")
_CONFIGS = "transformers.utils.quantization_config"
# What reads config and tokenizer out of a container, in processes that make no model too.
_READERS = (
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.integrations.gguf.reader",
    "transformers.integrations.gguf.gguf_tokenizer_mapping",
    "transformers.integrations.ggml",
)
_GENERATION = "transformers.generation.utils"
# Not the package: where PEFT is what imports torch, that is there already and half made.
_PEFT = "peft.peft_model"


def arm() -> None:
    """Arrange that qhub joins transformers when, and only when, transformers' quantizers are imported."""
    if os.environ.get("QHUB_AUTOLOAD", "1").strip().lower() in ("0", "false", "no", "off"):
        return
    try:
        import wrapt

        for target in _TARGETS:
            wrapt.register_post_import_hook(_join, target)
        for target in _READERS:
            wrapt.register_post_import_hook(_join_readers, target)
        wrapt.register_post_import_hook(_join_generation, _GENERATION)
        wrapt.register_post_import_hook(_prepare, _CONFIGS)
        wrapt.register_post_import_hook(_join_peft, _PEFT)
    except Exception as error:
        # torch turns an exception here into a failed `import torch` for the whole process.
        warnings.warn(f"qhub could not arm its import hook, so its methods are not registered: {error!r}", stacklevel=2)


def _join(module: ModuleType) -> None:
    auto = sys.modules.get("transformers.quantizers.auto")
    if auto is None or not hasattr(auto, "register_quantizer"):
        return
    try:
        from qhub.integrations.transformers import install

        install()
    except Exception as error:
        warnings.warn(f"qhub could not join transformers, so its methods are not registered: {error!r}", stacklevel=2)


def _join_readers(module: ModuleType) -> None:
    try:
        from qhub.integrations.transformers.containers import wrap_readers

        wrap_readers()
    except Exception as error:
        warnings.warn(f"qhub could not join transformers' readers of GGUF files: {error!r}", stacklevel=2)


def _join_generation(module: ModuleType) -> None:
    try:
        from qhub.decoding.door import install

        install()
    except Exception as error:
        warnings.warn(f"qhub could not join transformers' generation: {error!r}", stacklevel=2)


def _join_peft(module: ModuleType) -> None:
    try:
        from qhub.integrations.peft import install

        install()
    except Exception as error:
        warnings.warn(f"qhub could not join PEFT, so adapters may not merge as they should: {error!r}", stacklevel=2)


def _prepare(module: ModuleType) -> None:
    try:
        from qhub.integrations.config_classes import prepare

        prepare(module)
    except Exception as error:
        warnings.warn(f"qhub could not prepare transformers' config classes: {error!r}", stacklevel=2)
