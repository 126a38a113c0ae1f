"""What quantizing on the fly holds in memory: at most the largest shard beyond the quantized model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qhub.layouts import Affine, Grid, chunks
from qhub.layouts.chunks import all_finite, row_chunks

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def nested_4bit(weight: Tensor, kind: str) -> dict[str, Tensor]:
    blockwise = pytest.importorskip("qhub_bitsandbytes.blockwise")
    layout = pytest.importorskip("qhub_bitsandbytes.layout")
    return blockwise.quantize_blockwise(weight, layout.blockwise(*weight.shape, layout.nested_scales()), kind)


def int8(weight: Tensor) -> dict[str, Tensor]:
    return pytest.importorskip("qhub_bitsandbytes.int8").quantize_rows(weight)


def half_quadratic(weight: Tensor, **values: Any) -> dict[str, Tensor]:
    settings = pytest.importorskip("qhub_hqq.settings").Settings(**values)
    solver = pytest.importorskip("qhub_hqq.solver")
    return solver.quantize(weight, settings.layout(*weight.shape, "w"), settings)


def packed(weight: Tensor, bits: int) -> dict[str, Tensor]:
    layout = Affine(out_features=weight.shape[0], in_features=weight.shape[1], bits=bits, grid=Grid.along_k(64))
    return {"qweight": layout.pack_codes((weight.float() * 1e3).to(torch.int32) % 2**bits)}


ENCODERS = {
    "nf4": lambda w: nested_4bit(w, "nf4"),
    "fp4": lambda w: nested_4bit(w, "fp4"),
    "int8": int8,
    "hqq-rows": lambda w: half_quadratic(w, nbits=4, group_size=64, axis=1, round_zero=True),
    "hqq-columns": lambda w: half_quadratic(w, nbits=4, group_size=64, axis=0, round_zero=True),
    "hqq-3bit": lambda w: half_quadratic(w, nbits=3, group_size=64, axis=1),
    "hqq-whole-rows": lambda w: half_quadratic(w, nbits=2, group_size=None, axis=1),
    "hqq-one-scale": lambda w: half_quadratic(w, nbits=8, group_size=64, axis=1, channel_wise=False, optimize=False),
    "3bit-codes": lambda w: packed(w, 3),
    "4bit-codes": lambda w: packed(w, 4),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
# Rows that hold whole runs of 64 weights, and rows that do not.
@pytest.mark.parametrize("shape", [(192, 320), (256, 36), (128, 1000)], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_pieces_do_not_show(name: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    weight[3] = 0.0
    found = {}
    for size in (1 << 40, 3000):
        monkeypatch.setattr(chunks, "chunk_size", lambda device, size=size: size)
        found[size] = ENCODERS[name](weight)
    whole, cut = found.values()
    assert whole.keys() == cut.keys()
    for part, value in whole.items():
        # Bit for bit: zeros of both signs count as different.
        assert cut[part].dtype == value.dtype
        assert torch.equal(*(one.contiguous().view(-1).view(torch.uint8) for one in (cut[part], value))), part


@given(rows=st.integers(1, 300), cols=st.integers(1, 300), group=st.sampled_from([1, 2, 64, 96, 256]))
def test_pieces_cover_the_rows_in_order_and_hold_whole_runs(rows: int, cols: int, group: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "chunk_size", lambda device: 2048)
        pieces = list(row_chunks(rows, cols, torch.device("cpu"), group))
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(rows))
    for piece in pieces[:-1]:
        count = piece.stop - piece.start
        assert count * cols % group == 0
        # Larger than asked only where fewer rows hold no whole number of runs.
        assert count * cols <= 2048 or all(less * cols % group for less in range(1, count))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(bad: float, dtype: torch.dtype) -> None:
    # 37 values: some in whole vectors of any CPU, some in the rest.
    for place in range(37):
        values = torch.linspace(-2, 2, 37)
        assert all_finite(values.to(dtype))
        values[place] = bad
        assert not all_finite(values.to(dtype))
    assert all_finite(torch.empty(0, 4, dtype=dtype))


# -- the whole process ------------------------------------------------------------------------------------------------

MIB = 1 << 20
# What a process takes beyond the weights:
# * 1 MiB: Python's objects for the model's modules and parameters (32 KB a layer by tracemalloc).
# * 1 MiB: the kernel counts a thread's pages in lots of 64 (256 KiB); torch and the loader run up to four threads.
# * 2 MiB: the C library hands out memory in pages and keeps a heap's last 128 KiB; a weight has up to six tensors in
#   127 quantized matrices, of which the small ones share pages and the others end in one that is half full on average.
ALLOWANCE = 4 * MIB

CONFIGS = {
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
    "int8": "BitsAndBytesConfig(load_in_8bit=True)",
    "hqq": "HqqConfig(nbits=4, group_size=64)",
}

# Prints the rise of the process's largest resident size while the second model is quantized, in bytes, and the
# quantized model's size. The first one makes the process import and allocate all that does not depend on the model.
PROGRAM = """
import ctypes, gc, json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

small, large, config = sys.argv[1:]
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, quantization_config=eval(config))
load(small)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
base = status("VmRSS")
model = load(large)
assert type(model.hf_quantizer).__name__.startswith("PluginQuantizer"), type(model.hf_quantizer)
print(json.dumps([status("VmHWM") - base, model.get_memory_footprint()]))
"""


def save_llama(folder: Path, hidden: int, layers: int, shard: str) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("memory")
    return save_llama(folder / "small", 128, 1, "1GB"), save_llama(folder / "large", 512, 18, "20MB")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and memory is given back only there")
@pytest.mark.parametrize("name", CONFIGS)
def test_at_most_the_largest_shard_beyond_the_quantized_model(name: str, models: tuple[Path, Path]) -> None:
    pytest.importorskip("qhub_hqq" if name == "hqq" else "qhub_bitsandbytes")
    small, large = models
    shards = [file.stat().st_size for file in large.glob("*.safetensors")]
    assert sum(shards) > 145 * 10**6 and len(shards) > 7 and max(shards) < 21 * 10**6
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(small), str(large), CONFIGS[name]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rise, quantized = json.loads(run.stdout.splitlines()[-1])
    # The measurement itself: the model is there in the end.
    assert rise > 0.9 * quantized
    beyond = rise - quantized
    assert beyond <= max(shards) + ALLOWANCE, (
        f"{name}: {beyond / MIB:.1f} MiB beyond the quantized model of {quantized / MIB:.1f} MiB, "
        f"the largest shard has {max(shards) / MIB:.1f}"
    )
