"""Names and shapes of weights: between the tensors of a GGUF file and the parameters of a transformers model."""

from __future__ import annotations

from qhub_gguf.names.architectures import ARCHITECTURES, architecture_of, architecture_of_config
from qhub_gguf.names.entry import Change, Entry, Part
from qhub_gguf.names.mapping import Mapping

__all__ = ["ARCHITECTURES", "Change", "Entry", "Mapping", "Part", "architecture_of", "architecture_of_config"]
