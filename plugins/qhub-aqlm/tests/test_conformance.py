"""qhub's invariants, as every method has to keep them."""

from __future__ import annotations

from pathlib import Path

from qhub.testing import MethodConformance


class TestAqlm(MethodConformance):
    method = "aqlm"
    can_quantize = False
    checkpoint = Path(__file__).parent / "data" / "tiny-llama-2x8"
    bad_configs = [{"num_codebooks": 0}, {"nbits_per_codebook": 20}, {"in_group_size": 48}, {"bits": 2}]
    native_packages = ("aqlm",)
