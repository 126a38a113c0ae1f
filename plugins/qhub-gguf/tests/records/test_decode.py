"""Records are read as ggml reads them, bit for bit."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qhub_gguf.records import RECORDS, record_of
from qhub_gguf.records.fields import join, spread
from qhub_gguf.types import TYPES
from torch import Tensor

from qhub.errors import UnsupportedError
from qhub.layouts import Blocks


def _records(name: str, data: Tensor) -> Tensor:
    return data.unflatten(-1, (-1, RECORDS[name].size))


def _bits(weights: Tensor) -> Tensor:
    return weights.contiguous().view(torch.int32)


def test_every_block_type_of_a_file_is_there() -> None:
    assert set(RECORDS) == {n for n, kind in TYPES.items() if kind.dtype is None} - {"Q8_1", "Q8_K"}
    for name, record in RECORDS.items():
        assert (record.name, record.count, record.size) == (name, TYPES[name].count, TYPES[name].size)
        assert record.count % record.group == 0 and record.group % record.width == 0


def test_decode_is_bit_exact(name: str, references: dict[str, Tensor]) -> None:
    decoded = RECORDS[name].decode(_records(name, references[f"{name}.records"])).flatten(-2)
    assert torch.equal(_bits(decoded), _bits(references[f"{name}.decoded"]))


def test_decode_takes_bytes_that_do_not_lie_together(name: str, references: dict[str, Tensor]) -> None:
    data = _records(name, references[f"{name}.records"])
    # Odd places, strides of their own, and a batch.
    room = torch.zeros(3, *data.shape[:-1], data.shape[-1] + 3, dtype=torch.uint8)
    room[..., 1:-2] = data
    assert torch.equal(RECORDS[name].decode(room[1:, ..., 1:-2])[1], RECORDS[name].decode(data))


@pytest.mark.parametrize("seed", range(3))
def test_decode_agrees_with_gguf_py(name: str, seed: int) -> None:
    gguf = pytest.importorskip("gguf")
    kind = getattr(gguf.GGMLQuantizationType, name, None)
    data = np.random.default_rng(seed).integers(0, 256, (64, RECORDS[name].size), np.uint8)
    if kind is None:
        pytest.skip(f"this gguf-py does not know {name}")
    try:
        with np.errstate(all="ignore"):
            wanted = gguf.dequantize(data, kind)
    except NotImplementedError:
        pytest.skip(f"gguf-py cannot decode {name}")
    decoded = RECORDS[name].decode(torch.from_numpy(data)).numpy()
    # Scales of random bits may be NaN, of whatever bits.
    assert np.array_equal(decoded, wanted, equal_nan=True)


def test_record_is_the_same_in_every_process(name: str) -> None:
    record = record_of(name)
    for other in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record)):
        assert other == record and hash(other) == hash(record)
    assert repr(record) == f"Record({name})"
    layout = Blocks(out_features=3, in_features=512, record=record)
    assert pickle.loads(pickle.dumps(layout)) == layout


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "Q9_9"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        record_of(name)


@given(bits=st.sampled_from([1, 2, 4, 8]), run=st.sampled_from([1, 2, 8, 16, 32]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_join_undoes_spread(bits: int, run: int, seed: int) -> None:
    field = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 2 * run), np.uint8))
    codes = spread(field, bits, run)
    assert torch.equal(join(codes, bits, run), field)
    # The code at place p of a run is in byte p % run, at bit bits * (p // run).
    for place in {0, run, (8 // bits) * run - 1}:
        byte, shift = place % run, bits * (place // run)
        if shift < 8:
            assert torch.equal(codes[:, place], field[:, byte] >> shift & (2**bits - 1))
