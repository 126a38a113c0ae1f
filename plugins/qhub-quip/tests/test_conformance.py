"""qhub's invariants, as every method has to keep them."""

from __future__ import annotations

from pathlib import Path

from qhub.testing import MethodConformance


class TestQuip(MethodConformance):
    method = "quip"
    can_quantize = False
    checkpoint = Path(__file__).parent / "data" / "tiny-llama"
    bad_configs = [
        {"codebook": "E8P14"},
        {"lora_rank": 8},
        {"codebook_version": 0},
        {"resid_scale_override": float("nan")},
        {"packsz": 2},
        {"bits": 2},
    ]
    native_packages = ("quiptools_cuda", "fast_hadamard_transform")
