"""The GGUF container: metadata and tensors to and from files, without knowledge of models."""

from __future__ import annotations

from qhub_gguf.container.reader import GgufFile
from qhub_gguf.container.tensors import TensorInfo, TensorSource
from qhub_gguf.container.values import Kind, Value
from qhub_gguf.container.writer import write, write_like, write_split

__all__ = ["GgufFile", "Kind", "TensorInfo", "TensorSource", "Value", "write", "write_like", "write_split"]
