"""On a GPU: dense weights bit for bit, the product in pieces, graph capture, and gradients through it."""

from __future__ import annotations

import pytest
import torch

from qhub.layouts import Affine, Grid, Lookup
from qhub.layouts.packing import pack
from qhub.layouts.tiled import Tiled

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
registers = pytest.importorskip("qhub_triton.dense.registers")
looked_up, table_bytes = registers.looked_up, registers.table_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
dense = pytest.importorskip("qhub_triton.dense.dequantize")
pieces = pytest.importorskip("qhub_triton.dense.linear")


@triton.jit
def _look_up(words, table, out, SIZE: tl.constexpr):
    dtype: tl.constexpr = out.dtype.element_ty
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    found = looked_up(tl.load(words + at), table_bytes(table, dtype), dtype)
    for place in tl.static_range(4):
        tl.store(out + place * 65536 + at, found[place])


def made(n, k, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    layout = Affine(out_features=n, in_features=k, bits=4, grid=Grid.along_k(128), zero="value")
    q = torch.randint(0, 16, (n, k), generator=generator, device="cuda", dtype=torch.uint8)
    shape = layout.scale_shape
    scales = (torch.rand(shape, generator=generator, device="cuda") * 0.02 + 0.005).bfloat16()
    zeros = torch.randint(0, 16, shape, generator=generator, device="cuda", dtype=torch.uint8)
    return layout, {"qweight": pack(q, 4), "scales": scales, "zeros": zeros}


@pytest.mark.parametrize("tiled", [False, True])
def test_in_pieces_equals_whole(tiled):
    n, k, m = 8192 + 64, 4096, 8192
    layout, parts = made(n, k)
    weight = layout.dequantize(parts, torch.bfloat16)
    if tiled:
        layout, parts = Tiled.arrange(layout, parts)
    assert pieces.piece_rows(layout, m, torch.bfloat16) == 2048
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        y = pieces.linear(x, layout, parts, bias)
        wanted = x[-64:].double() @ weight.double().t() + bias.double()
        error = (y[-64:].double() - wanted).norm() / wanted.norm()
        assert error < 3e-3, error
        assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype):
    layout, parts = made(300, 1024)
    wanted = layout.dequantize(parts, dtype)
    assert torch.equal(dense.dequantize(layout, parts, dtype), wanted)
    assert torch.equal(dense.dequantize(*Tiled.arrange(layout, parts), dtype), wanted)


def test_in_a_graph():
    layout, parts = made(8192, 4096)
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    wanted = pieces.linear(x, layout, parts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = pieces.linear(x, layout, parts)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, wanted)


def test_past_two_to_the_31():
    layout = Lookup(out_features=70000, in_features=32768, bits=4, grid=Grid.along_k(64))
    generator = torch.Generator(device="cuda").manual_seed(0)
    parts = {
        "qweight": torch.randint(0, 256, (70000, 16384), generator=generator, device="cuda", dtype=torch.uint8),
        "table": torch.randn(16, generator=generator, device="cuda"),
        "scales": torch.rand(70000, 512, generator=generator, device="cuda"),
    }
    found = dense.dequantize(layout, parts, torch.bfloat16)
    for start in (0, 65500, 69990):
        cut = layout.select_rows(parts, start, start + 10)
        assert torch.equal(found[start : start + 10], cut[0].dequantize(cut[1], torch.bfloat16))


def test_on_another_stream_and_again():
    layout, parts = made(512, 1024)
    wanted = layout.dequantize(parts, torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            found = dense.dequantize(layout, parts, torch.float16)
    stream.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_registers(dtype):
    if torch.version.cuda is None:
        pytest.skip("holds instructions of NVIDIA's")
    words = torch.arange(65536, device="cuda", dtype=torch.int32)
    # Neighbours, which are looked up together, are no relatives.
    words = words[torch.randperm(65536, generator=torch.Generator().manual_seed(0)).cuda()].to(torch.int16)
    table = torch.randn(16, device="cuda")
    out = torch.empty(4, 65536, device="cuda", dtype=dtype)
    _look_up[(64,)](words, table, out, SIZE=1024)
    codes = words.to(torch.int32)
    for place in range(4):
        assert torch.equal(out[place], table.to(dtype)[(codes >> (4 * place)) & 15])
