"""What this plugin quantizes and packs, gptqmodel's own layer dequantizes to the same weights. Needs gptqmodel."""

from __future__ import annotations

import pytest
import torch
from qhub_gptq.dynamic import Settings
from qhub_gptq.format import GptqFormat
from qhub_gptq.hessian import Damping
from qhub_gptq.plan import layout_of
from qhub_gptq.quantize import Options, quantize

N, K, GROUP = 64, 192, 64


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize(("sym", "v1"), [(True, True), (True, False), (False, False)], ids=["v1", "v2", "asym v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_dequantizes_what_was_written(
    bits: int, sym: bool, v1: bool, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gptqmodel multiplies in float16: the float32 weight rounded once."""
    # Its pool of threads does not start with what it chooses itself on one or two cores.
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    generator = torch.Generator().manual_seed(bits)
    # Away from zero, so that zeros of the asymmetric grids differ.
    weight = torch.randn(N, K, generator=generator) + torch.randn(N, 1, generator=generator)
    inputs = torch.randn(4 * K, K, generator=generator) * torch.rand(K, generator=generator)
    layout = layout_of(Settings(bits, GROUP, act_order, sym), N, K)
    options = Options(order="features" if act_order else "groups", damping=Damping(0.05, 0.01))
    parts = quantize(weight, layout, {"hessian": inputs.t() @ inputs / len(inputs)}, options)
    layer = TorchLinear(
        bits=bits,
        group_size=GROUP,
        sym=sym,
        desc_act=act_order,
        in_features=K,
        out_features=N,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    for name, entry in GptqFormat(v1).pack(layout, parts, torch.float16).items():
        buffer = layer.get_buffer(name)
        assert (buffer.shape, buffer.dtype) == (entry.shape, entry.dtype), name
        buffer.copy_(entry)
    if v1:
        convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    found = layer.dequantize_weight().t()
    assert found.dtype == torch.float16
    assert torch.equal(found, layout.dequantize(parts).half())
