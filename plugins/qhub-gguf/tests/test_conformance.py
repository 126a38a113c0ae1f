"""qhub's invariants, as every method has to keep them."""

from __future__ import annotations

from pathlib import Path

from qhub.testing import MethodConformance

_DATA = Path(__file__).parent / "data"


class TestGguf(MethodConformance):
    method = "gguf"
    configs = [
        {"file_type": "Q4_K_M"},
        {"file_type": "Q8_0", "embeddings": False},
        {"file_type": "Q4_0", "output": False, "tensor_types": {"ffn_down": "IQ4_NL"}},
    ]
    bad_configs = [
        {"file_type": "Q4_Z"},
        {"tensor_types": {"attn": "Q9_K"}},
        {"imatrix": "a.dat", "calibrate": True},
    ]
    # Blocks of the K-quants hold 256 weights; GGUF has no names for OPT.
    architectures = ("llama", "qwen3_moe")
    hidden_size = 256
    native_packages = ("gguf", "llama_cpp")
