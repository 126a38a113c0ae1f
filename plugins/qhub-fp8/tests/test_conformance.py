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


class TestInc(MethodConformance):
    method = "inc"
    configs = [
        {"scale_method": "maxabs_hw", "blocklist": {"names": ["lm_head"], "types": []}},
        {"scale_method": "act_maxabs_pow2_weights_pcs_opt_pow2", "fp8_config": "E5M2", "hp_dtype": "fp32"},
        {"scale_method": "maxabs_pcs_pow2", "dynamic_quantization": True},
    ]
    bad_configs = [
        {"scale_method": "smoothquant_weights_maxabs_pow2"},
        {"fp8_config": "E3M4"},
        {"mode": "GUESS"},
        {"blocklist": ["lm_head"]},
        {"scale_method": "maxabs_pcs_pow2"},
        {"allowlist": {"names": ["("]}},
    ]
    checkpoint = _DATA / "inc-channels"
    native_packages = ("neural_compressor", "habana_frameworks")


class TestMxfp4(MethodConformance):
    method = "mxfp4"
    configs = [{}]
    bad_configs = [{"modules_to_not_convert": "lm_head"}]
    native_packages = ("triton", "kernels")
    # Normally distributed weights, 32 under a power of two; measured 18.6 dB.
    min_sqnr = {0: 17.5}


class TestNvfp4(MethodConformance):
    method = "nvfp4"
    configs = [{}]
    bad_configs = [{"modules_to_not_convert": "lm_head"}]
    native_packages = ("kernels",)
    # Normally distributed weights, 16 under an E4M3 scale; measured 20.6 dB.
    min_sqnr = {0: 19.5}
