"""qhub's invariants, as every method has to keep them."""

from __future__ import annotations

from pathlib import Path

from qhub.testing import MethodConformance

_DATA = Path(__file__).parent / "data"


class TestGptq(MethodConformance):
    method = "gptq"
    configs = [
        {"bits": 4, "group_size": 32},
        {"bits": 3, "group_size": 64, "sym": False, "desc_act": True, "format": "gptq_v2"},
        {"bits": 2, "group_size": 32, "sym": False, "quality": "high"},
    ]
    checkpoint = [_DATA / f"tiny-llama-{case}" for case in ("b4-g32-act", "b4-g32-asym", "b3-g128-act-asym-v2")]
    bad_configs = [
        {"bits": 5},
        {"bits": 4, "group_size": 0},
        {"bits": 4, "format": "marlin"},
        {"bits": 4, "pack_dtype": "int8"},
        {"bits": 4, "dynamic": {"+:.*q_proj": {"bits": 7}}},
        {"bits": 4, "quality": "best"},
        {"bits": 4, "damp_auto_increment": -1},
        {"bits": 4, "static_groups": "yes"},
    ]
    native_packages = ("gptqmodel", "optimum", "auto_gptq")
