"""qhub's invariants, as every method has to keep them."""

from __future__ import annotations

from pathlib import Path

from qhub.testing import MethodConformance

_DATA = Path(__file__).parent / "data"


class TestFp8(MethodConformance):
    method = "fp8"
    configs = [
        # The widths of the kit's models are no multiples of 48: the last block of a row or column is a smaller one.
        {"weight_block_size": [48, 48], "activation_scheme": "dynamic"},
        {"weight_block_size": None, "activation_scheme": "static", "fmt": "e5m2"},
        {"weight_block_size": [128, 128], "activation_scheme": "none", "scale_fmt": "ue8m0"},
    ]
    checkpoint = _DATA / "tiny-llama-b64"
    bad_configs = [
        {"weight_block_size": [0, 128]},
        {"weight_block_size": [128]},
        {"activation_scheme": "sometimes"},
        {"fmt": "e4m3fnuz"},
        {"scale_fmt": "e8m0"},
        {"modules_to_not_convert": "lm_head"},
    ]
    native_packages = ("triton", "kernels", "fbgemm_gpu")


class TestFbgemmFp8(MethodConformance):
    method = "fbgemm_fp8"
    configs = [{"activation_scale_ub": 1200.0}, {"activation_scale_ub": 2.0, "modules_to_not_convert": ["lm_head"]}]
    bad_configs = [{"activation_scale_ub": -1.0}, {"activation_scale_ub": "much"}]
    native_packages = ("fbgemm_gpu",)
