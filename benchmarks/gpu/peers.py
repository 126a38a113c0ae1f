"""What torch and bitsandbytes offer: cuBLAS, tinygemm, NF4, LLM.int8(), float8 products with a one-kernel quantizer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Contestant, Prepared, copies_of

__all__ = ["CONTESTANTS"]


def _cublas(dtype: torch.dtype) -> Any:
    def prepare(case: Case) -> Prepared:
        weight = case.weight.to(dtype)
        copies = copies_of(weight.nbytes, weight.clone)
        return Prepared(lambda x, i: torch.nn.functional.linear(x, copies[i]), len(copies), weight.nbytes, weight.float)

    return prepare


def _tinygemm(case: Case) -> Prepared:
    q, scales = case.int4
    packed = torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
    both = torch.stack([scales, torch.zeros_like(scales)], dim=-1).to(torch.bfloat16).transpose(0, 1).contiguous()
    nbytes = packed.nbytes + both.nbytes
    copies = copies_of(nbytes, lambda: (packed.clone(), both.clone()))

    def call(x: Tensor, i: int) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, copies[i][0], 128, copies[i][1])

    return Prepared(call, len(copies), nbytes, lambda: case.dense_of(q, scales, 8.0))


def _bnb_nf4(nested: bool) -> Any:
    def prepare(case: Case) -> Prepared:
        import bitsandbytes as bnb
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(
            case.weight, blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        groups = case.n * case.k // 64
        nbytes = packed.nbytes + (groups + groups // 256 * 4 if nested else groups * 4)
        copies = copies_of(nbytes, lambda: (packed.clone(), copy.deepcopy(state)))

        def call(x: Tensor, i: int) -> Tensor:
            return bnb.matmul_4bit(x, copies[i][0].t(), copies[i][1])

        return Prepared(call, len(copies), nbytes, lambda: functional.dequantize_4bit(packed, state).float())

    return prepare


def _bnb_int8(case: Case) -> Prepared:
    import bitsandbytes as bnb

    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(case.weight.to(torch.float16))

    def make() -> Any:
        layer = bnb.nn.Linear8bitLt(case.k, case.n, bias=False, has_fp16_weights=False, threshold=0.0, device="meta")
        own = codes.clone()
        layer.weight = bnb.nn.Int8Params(own, requires_grad=False, has_fp16_weights=False, CB=own, SCB=absmax.clone())
        return layer.eval()

    nbytes = case.n * case.k + case.n * 4
    copies = copies_of(nbytes, make)

    def dense() -> Tensor:
        return codes.float() * (absmax.float() / 127.0).unsqueeze(-1)

    return Prepared(lambda x, i: copies[i](x), len(copies), nbytes, dense, _rounded("int8"))


def _rounded(kind: Any) -> Any:
    from qhub.layouts.activations import Activation, rounded_input

    activation = Activation(kind)
    return lambda x: rounded_input(x, activation, {})


def float8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return E4M3 codes (N, K) and scales (N, 1) float32 of ``weight`` (N, K): each row's largest magnitude on 448."""
    scales = (weight.abs().amax(dim=1, keepdim=True).float() / 448.0).clamp_min(1e-12)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for start in range(0, weight.shape[0], 1024):
        rows = slice(start, start + 1024)
        codes[rows] = (weight[rows].float() / scales[rows]).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales


def _scaled_mm(case: Case) -> Prepared:
    from benchmarks.gpu.quantizer import quantize_rows

    codes, scales = float8_rows(case.weight)
    row = scales.reshape(1, -1).contiguous()
    nbytes = codes.nbytes + row.nbytes
    copies = copies_of(nbytes, lambda: (codes.clone().t(), row.clone()))

    def call(x: Tensor, i: int) -> Tensor:
        inputs, own = quantize_rows(x)
        return torch._scaled_mm(
            inputs, copies[i][0], scale_a=own, scale_b=copies[i][1], out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return Prepared(call, len(copies), nbytes, lambda: codes.float() * scales, _rounded("float8"))


CONTESTANTS = [
    Contestant("cublas_bf16", "dense", _cublas(torch.bfloat16)),
    Contestant("cublas_bf16_again", "dense", _cublas(torch.bfloat16), note="null control: the same call again"),
    Contestant("cublas_fp16", "dense", _cublas(torch.float16), dtype=torch.float16),
    Contestant("tinygemm_int4", "int4", _tinygemm, most=256, note="torch; a tenth of cuBLAS above 256 rows: not run"),
    Contestant("bnb_nf4", "nf4", _bnb_nf4(False), note="bitsandbytes, blocks of 64"),
    Contestant("bnb_nf4_nested", "nf4_nested", _bnb_nf4(True), note="bitsandbytes, blocks of 64, double quantization"),
    Contestant("bnb_int8", "int8_dynamic", _bnb_int8, limit=0.06, note="bitsandbytes LLM.int8(), threshold 0"),
    Contestant("scaled_mm_fp8", "fp8_dynamic", _scaled_mm, limit=0.06, note="torch._scaled_mm, one-kernel quantizer"),
]
