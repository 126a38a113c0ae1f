"""The numbers chosen are bitsandbytes' own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from qhub_bitsandbytes import qhub_format, qhub_plan, qhub_quantize
from qhub_bitsandbytes.blockwise import quantize_blockwise, quantize_scales
from qhub_bitsandbytes.int8 import quantize_rows
from qhub_bitsandbytes.layout import blockwise, nested_scales
from qhub_bitsandbytes.tables import dynamic_map, quant_type_of, value_table
from transformers import BitsAndBytesConfig

from qhub.errors import LayoutError
from qhub.plan import WeightInfo


def same_bytes(first, second):
    """Return whether two tensors agree in dtype, shape and every bit."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*flat)


def test_quantizing_gives_upstreams_entries(golden):
    parts = qhub_quantize(golden.config, golden.input, golden.layout)
    golden.layout.validate(parts)
    entries = qhub_format(golden.config).pack(golden.layout, parts, golden.dtype)
    assert sorted(entries) == sorted(golden.entries)
    for name, expected in golden.entries.items():
        assert same_bytes(entries[name], expected), name


def test_transposed_weights_are_quantized_in_their_logical_order(golden):
    strided = golden.input.t().contiguous().t()
    assert not strided.is_contiguous() or 1 in strided.shape
    expected = qhub_quantize(golden.config, golden.input, golden.layout)
    found = qhub_quantize(golden.config, strided, golden.layout)
    assert all(same_bytes(found[name], part) for name, part in expected.items())


def test_known_files_decode_to_upstreams_weights(upstream):
    layout, parts = qhub_format(upstream.config).unpack(upstream.layout, upstream.entries)
    assert torch.equal(layout.dequantize(parts), upstream.dequantized)


def test_chunks_do_not_show(monkeypatch):
    # 37 columns: runs of 64 cross rows, and the last one is short.
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(150, 37, generator=generator)
    layout = blockwise(150, 37, nested_scales())
    whole, whole_rows = quantize_blockwise(weight, layout, "fp4"), quantize_rows(weight)
    monkeypatch.setattr("qhub.layouts.chunks.chunk_size", lambda device: 128)
    cut, cut_rows = quantize_blockwise(weight, layout, "fp4"), quantize_rows(weight)
    assert all(same_bytes(cut[name], part) for name, part in whole.items())
    assert all(same_bytes(cut_rows[name], part) for name, part in whole_rows.items())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(4, 64), (3, 50)])
def test_codes_are_the_nearest(quant_type, shape):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    layout = blockwise(*shape, nested=None)
    parts = quantize_blockwise(weight.float(), layout, quant_type)
    flat = weight.float().double().reshape(-1)
    scale = parts["scales"].reshape(-1).double().repeat_interleave(64)[: flat.numel()]
    candidates = (value_table(quant_type).double() * scale.unsqueeze(1) - flat.unsqueeze(1)).abs()
    chosen = (layout.decode(parts).double().reshape(-1) - flat).abs()
    # The decoded weight and the ratio w / absmax are float32: three roundings of values up to absmax.
    assert bool((chosen <= candidates.amin(1) + 3 * 2.0**-24 * scale).all())


def test_the_dynamic_map():
    table = dynamic_map()
    assert table.shape == (256,) and bool((table.diff() > 0).all())
    # By Dettmers 2015: symmetric but for 0 and 1; 64 values in [0.1, 1], one in [1e-7, 1e-6].
    inner = table[(table != 0) & (table != 1)]
    assert torch.equal(inner, -inner.flip(0))
    assert float(inner[-1]) == pytest.approx(1 - 0.9 / 128, rel=1e-6)
    assert float(inner[inner > 0][0]) == pytest.approx(0.55e-6, rel=1e-6)


def test_nested_scales_decode_within_half_a_step():
    generator = torch.Generator().manual_seed(7)
    absmax = torch.rand(700, generator=generator) + 0.5
    codes, supers, offset = quantize_scales(absmax, 256)
    assert supers.shape == (3,) and codes.dtype == torch.uint8
    decoded = nested_scales().values(
        "s", (700,), {"s": codes, "s_super": supers, "s_table": dynamic_map(), "s_offset": offset}
    )
    # Half the widest gap of the map (0.9 / 64), and half a step of the lookup's grid of 65,536 steps.
    bound = (0.9 / 128 + 2.0**-16) * supers.repeat_interleave(256)[:700]
    assert bool(((decoded - absmax).abs() <= bound * (1 + 1e-5)).all())


def test_nested_codes_are_those_of_upstreams_cpu_library(known_scales):
    codes, supers, offset = quantize_scales(known_scales["input"], 256)
    for name, found in (("codes", codes), ("supers", supers), ("offset", offset)):
        assert same_bytes(found, known_scales[name]), name
    # They are not always the nearest entries: a plain search would fail the line above.
    ratio = (known_scales["input"] - offset) / supers.repeat_interleave(256)
    nearest = (dynamic_map() - ratio.unsqueeze(1)).abs().argmin(1)
    assert 0 < int((nearest != known_scales["codes"]).sum()) < 0.01 * len(ratio)


def test_a_single_block_is_all_offset():
    codes, supers, offset = quantize_scales(torch.tensor([0.25]), 256)
    assert codes.tolist() == [0] and supers.tolist() == [0.0] and float(offset) == 0.25


def test_tables_do_not_follow_the_default_device():
    for cached in (value_table, dynamic_map):
        cached.cache_clear()
    with torch.device("meta"):
        assert value_table("nf4").device.type == value_table("fp4").device.type == dynamic_map().device.type == "cpu"
    assert quant_type_of(value_table("fp4")) == "fp4"
    assert quant_type_of(value_table("nf4")) == "nf4"
    assert quant_type_of(value_table("nf4").flip(0)) is None


def test_parts_do_not_share_the_cached_tables():
    layout = blockwise(2, 64, nested_scales())
    parts = quantize_blockwise(torch.ones(2, 64), layout, "nf4")
    parts["table"].zero_()
    parts["scales_table"].zero_()
    assert float(value_table("nf4")[0]) == -1.0 and float(dynamic_map()[-1]) == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_cannot_be_stored_are_refused(value):
    weight = torch.ones(2, 64)
    weight[1, 3] = value
    with pytest.raises(LayoutError, match="NaN or infinity"):
        quantize_blockwise(weight, blockwise(2, 64, None), "nf4")
    with pytest.raises(LayoutError, match="NaN, infinity"):
        quantize_rows(weight)


def test_int8_refuses_what_float16_cannot_hold():
    with pytest.raises(LayoutError, match="65,504"):
        quantize_rows(torch.tensor([[7e4, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 200), (129, 33), (1, 1)])
def test_agrees_with_the_library_live(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    nn = pytest.importorskip("bitsandbytes.nn")
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(shape, generator=generator).to(dtype)
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested
            )
            layout = qhub_plan(config, [WeightInfo("w", *shape, dtype)])["w"].layout
            parts = qhub_quantize(config, weight, layout)
            entries = qhub_format(config).pack(layout, parts, dtype)
            packed, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
            expected = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
            assert sorted(entries) == sorted(expected)
            assert all(same_bytes(entries[name], entry) for name, entry in expected.items())
            dense = functional.dequantize_4bit(packed, state).reshape(shape)
            assert torch.equal(layout.dequantize(parts, dtype), dense)
    rows = quantize_rows(weight)
    theirs = nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    assert torch.equal(rows["qweight"], theirs.data) and torch.equal(rows["scales"].squeeze(1), theirs.SCB)
