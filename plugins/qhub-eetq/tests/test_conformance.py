"""qhub's invariants, as every method has to keep them."""

from __future__ import annotations

from pathlib import Path

from qhub.testing import MethodConformance


class TestEetq(MethodConformance):
    method = "eetq"
    configs = [{"weights": "int8"}]
    checkpoint = Path(__file__).parent / "data" / "tiny-llama"
    bad_configs = [{"weights": "int4"}, {"modules_to_not_convert": "lm_head"}, {"bits": 8}]
    native_packages = ("EETQ", "kernels")
    min_sqnr = {0: 38.0}
