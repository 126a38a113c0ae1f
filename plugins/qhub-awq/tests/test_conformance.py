"""qhub's invariants, as every method has to keep them."""

from __future__ import annotations

from pathlib import Path

from qhub.testing import MethodConformance

_DATA = Path(__file__).parent / "data"


class TestAwq(MethodConformance):
    method = "awq"
    configs = [
        {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        {"bits": 4, "group_size": 64, "zero_point": False, "version": "gemv"},
        {"bits": 4, "group_size": 128, "zero_point": True, "version": "llm-awq"},
    ]
    checkpoint = [_DATA / f"tiny-llama-{case}" for case in ("gemm-g32", "gemv-g64", "gemv_fast-g128")]
    bad_configs = [
        {"bits": 3},
        {"group_size": 0},
        {"group_size": 8 * 7},
        {"version": "marlin"},
        {"pack_dtype": "int8"},
        {"desc_act": True},
    ]
    native_packages = ("awq", "gptqmodel")
