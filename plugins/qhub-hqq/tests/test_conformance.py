"""qhub's invariants, as every method has to keep them."""

from __future__ import annotations

from pathlib import Path

from qhub.testing import MethodConformance


class TestHqq(MethodConformance):
    method = "hqq"
    configs = [
        {"nbits": 4, "group_size": 64},
        {"nbits": 3, "group_size": 32, "axis": 0},
        # The tags of Llama and Qwen, and of OPT.
        {
            "dynamic_config": {
                "self_attn.q_proj": {"nbits": 8},
                "self_attn.v_proj": {"nbits": 2, "view_as_float": True},
                "decoder.fc1": {"nbits": 3, "group_size": 128},
            }
        },
    ]
    bad_configs = [{"nbits": 5}, {"axis": 2}, {"group_size": 8 * 7}, {"dynamic_config": {"attention": {"nbits": 4}}}]
    checkpoint = Path(__file__).parent / "data" / "tiny-llama-b3-axis0"
    native_packages = ("hqq",)
    # Rounding to a uniform grid over the range of 64 (32) normally distributed weights; measured 21.2 and 16.0 dB.
    min_sqnr = {0: 20.0, 1: 15.0}
