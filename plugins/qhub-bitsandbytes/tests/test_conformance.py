"""bitsandbytes against the invariants of qhub: nested NF4, FP4 with another compute dtype, LLM.int8()."""

from __future__ import annotations

from qhub.testing import MethodConformance


class TestBitsandbytes(MethodConformance):
    method = "bitsandbytes"
    configs = [
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="bfloat16"),
        dict(load_in_8bit=True),
    ]
    bad_configs = [dict(load_in_4bit=True, bnb_4bit_quant_type="nf3"), dict(load_in_8bit=True, llm_int8_threshold=-1.0)]
    native_packages = ("bitsandbytes",)
