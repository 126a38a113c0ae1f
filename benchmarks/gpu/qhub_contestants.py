"""qhub's layouts as contestants, through its public interface: QuantizedTensor.build and torch.nn.functional.linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import GROUP, Case, Contestant, Prepared, copies_of
from benchmarks.gpu.peers import float8_rows

__all__ = ["CONTESTANTS", "MAKERS", "Made", "weight_of"]

Made = tuple[Any, dict[str, Tensor]]


def weight_of(layout: Any, parts: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Return a quantized weight that owns its tensors, arranged for this machine's kernels as a loaded model's is."""
    from qhub import QuantizedTensor
    from qhub.kernels.arranging import arrange_tensor

    weight = QuantizedTensor.build(layout, {name: part.clone() for name, part in parts.items()}, dtype)
    arrange_tensor(weight)
    return weight


def _prepare(make: Callable[[Case], Made], dtype: torch.dtype) -> Callable[[Case], Prepared]:
    def prepare(case: Case) -> Prepared:
        from qhub.layouts import nbytes
        from qhub.layouts.activations import rounded_input

        layout, parts = make(case)
        copies = copies_of(nbytes(parts), lambda: weight_of(layout, parts, dtype))

        def call(x: Tensor, i: int) -> Tensor:
            return torch.nn.functional.linear(x, copies[i])

        def rounded(x: Tensor) -> Tensor:
            threshold = layout.activation.threshold
            if not threshold:
                return rounded_input(x, layout.activation, parts)
            # LLM.int8(), section 3.2: columns with an outlier stay as they are, and count for nothing in the scale.
            kept = (x.abs() >= threshold).any(0)
            inside = x.float().masked_fill(kept, 0.0)
            return torch.where(kept, x.float(), rounded_input(inside, layout.activation, parts))

        given = None if layout.activation.kind == "none" else rounded
        return Prepared(call, len(copies), copies[0].nbytes, lambda: layout.dequantize(parts, torch.float32), given)

    return prepare


def _affine(bits: int, zeros: bool = False) -> Callable[[Case], Made]:
    def make(case: Case) -> Made:
        from qhub.layouts import Affine, Grid
        from qhub.layouts.packing import pack

        q, scales = case.codes(bits)
        middle = (1 << bits) / 2 if bits > 1 else 0.5
        layout = Affine(
            out_features=case.n,
            in_features=case.k,
            bits=bits,
            grid=Grid.along_k(GROUP),
            zero="value" if zeros else "constant",
            zero_point=0.0 if zeros else middle,
        )
        parts = {"qweight": pack(q, bits), "scales": scales.to(torch.bfloat16)}
        if zeros:
            # Zeros of all sizes, so that nothing can be taken for symmetric.
            generator = torch.Generator(case.device).manual_seed(case.seed)
            shape = (case.n, case.k // GROUP)
            drawn = torch.randint(0, 1 << bits, shape, generator=generator, device=case.device)
            parts["zeros"] = drawn.to(torch.uint8)
        return layout, parts

    return make


def _nf4(nested: bool) -> Callable[[Case], Made]:
    def make(case: Case) -> Made:
        from qhub_bitsandbytes.blockwise import quantize_blockwise
        from qhub_bitsandbytes.layout import blockwise, nested_scales

        layout = blockwise(case.n, case.k, nested_scales() if nested else None)
        return layout, quantize_blockwise(case.weight, layout, "nf4")

    return make


def _float8(dynamic: bool) -> Callable[[Case], Made]:
    def make(case: Case) -> Made:
        from qhub.layouts import Float8, Grid
        from qhub.layouts.activations import Activation

        codes, scales = float8_rows(case.weight)
        layout = Float8(
            out_features=case.n,
            in_features=case.k,
            grid=Grid.along_k(case.k),
            activation=Activation("float8" if dynamic else "none"),
        )
        return layout, {"qweight": codes, "scales": scales}

    return make


def _llm_int8(threshold: float) -> Callable[[Case], Made]:
    def make(case: Case) -> Made:
        from qhub_bitsandbytes.int8 import quantize_rows
        from qhub_bitsandbytes.layout import int8

        return int8(case.n, case.k, threshold), quantize_rows(case.weight)

    return make


def _aqlm(case: Case) -> Made:
    from qhub.layouts import Codebook, Grid

    generator = torch.Generator(case.device).manual_seed(case.seed)
    layout = Codebook(
        out_features=case.n,
        in_features=case.k,
        nbits=(8, 8),
        out_group=1,
        in_group=8,
        grid=Grid("block", 1, case.k),
    )
    codes = torch.randint(-128, 128, (case.n, case.k // 8, 2), generator=generator, device=case.device)
    books = torch.randn(2, 256, 1, 8, generator=generator, device=case.device) * 0.5**0.5
    scales = torch.rand(case.n, 1, generator=generator, device=case.device) * 0.02 + 0.01
    return layout, {
        "codes": codes.to(torch.int8),
        "codebooks": books.to(torch.bfloat16),
        "scales": scales.to(torch.bfloat16),
    }


def _e8p(case: Case) -> Made:
    from qhub_quip.hadamard import factor_of, hadamard_matrix
    from qhub_quip.lattices import code_tables, lattice_layout

    generator = torch.Generator(case.device).manual_seed(case.seed)
    factors = factor_of(case.n, "the output"), factor_of(case.k, "the input")
    layout = lattice_layout("E8P12", case.n, case.k, None, factors, False)
    codes = torch.randint(-(1 << 15), 1 << 15, (case.n, case.k // 8, 1), generator=generator, device=case.device)
    parts: dict[str, Tensor] = {
        "codes": codes.to(torch.int16),
        "codebooks": code_tables("E8P12").to(case.device, copy=True),
        "scales": torch.full((1, 1), 0.02, dtype=torch.float16, device=case.device),
    }
    for side, size in (("in", case.k), ("out", case.n)):
        signs = torch.randint(0, 2, (size,), generator=generator, device=case.device) * 2 - 1
        parts[f"{side}_scale"] = signs.to(torch.float16)
    for side, factor in zip(("out", "in"), factors, strict=True):
        if factor > 1:
            parts[f"{side}_hadamard"] = hadamard_matrix(factor).to(case.device)
    return layout, {name: parts[name] for name in layout.part_specs()}


# What makes each layout's weight for a case, by name.
MAKERS: dict[str, Callable[[Case], Made]] = {
    "int4": _affine(4),
    "int4_zeros": _affine(4, zeros=True),
    "int8": _affine(8),
    "int3": _affine(3),
    "int2": _affine(2),
    "int1": _affine(1),
    "nf4": _nf4(False),
    "nf4_nested": _nf4(True),
    "fp8": _float8(False),
    "fp8_dynamic": _float8(True),
    "llm_int8": _llm_int8(0.0),
    "llm_int8_outliers": _llm_int8(6.0),
    "aqlm_2x8": _aqlm,
    "e8p": _e8p,
}


def _contestant(name: str, group: str | None = None, **settings: Any) -> Contestant:
    dtype = settings.get("dtype", torch.bfloat16)
    make = MAKERS[name.removesuffix("_fp16")]
    return Contestant(f"qhub_{name}", group or name, _prepare(make, dtype), peer=False, **settings)


CONTESTANTS = [
    _contestant("int4"),
    _contestant("int4_fp16", "int4", dtype=torch.float16),
    _contestant("int4_zeros"),
    _contestant("int8"),
    _contestant("int3"),
    _contestant("int2"),
    _contestant("int1"),
    _contestant("nf4"),
    _contestant("nf4_nested"),
    _contestant("fp8"),
    _contestant("fp8_dynamic", limit=0.06),
    _contestant("llm_int8", "int8_dynamic", limit=0.06),
    _contestant("llm_int8_outliers", "int8_outliers", limit=0.06, outliers=True),
    _contestant("aqlm_2x8", "codebook"),
    _contestant("e8p", "codebook"),
]
