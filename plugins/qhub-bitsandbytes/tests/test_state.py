"""The JSON state: upstream's bytes are written, and only what upstream could have written is read."""

from __future__ import annotations

import json

import pytest
import torch
from qhub_bitsandbytes.state import State, read_state, write_state

from qhub.errors import LayoutError

GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 256]}
NESTED = {**GOOD, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.21103382110595703}


def entry(value):
    """Return ``value`` (text, bytes, or what json.dumps takes) as an entry."""
    if not isinstance(value, (str, bytes)):
        value = json.dumps(value)
    raw = value.encode() if isinstance(value, str) else value
    return torch.tensor(list(raw), dtype=torch.uint8)


def test_the_bytes_are_upstreams():
    state = State("nf4", 64, "float32", (128, 256), 256, 0.21103382110595703)
    # As it stands in a checkpoint of bitsandbytes 0.50.2.
    expected = (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [128, 256], "nested_blocksize": 256, '
        b'"nested_dtype": "float32", "nested_offset": 0.21103382110595703}'
    )
    assert bytes(write_state(state).tolist()) == expected
    assert read_state("s", write_state(state)) == state


def test_a_plain_state_has_no_nested_keys():
    state = State("fp4", 64, "float16", (3, 5))
    assert json.loads(bytes(write_state(state).tolist())) == {
        **GOOD,
        "quant_type": "fp4",
        "dtype": "float16",
        "shape": [3, 5],
    }
    assert read_state("s", write_state(state)) == state


@pytest.mark.parametrize("base", [GOOD, NESTED], ids=["plain", "nested"])
def test_good_states_are_read(base):
    assert read_state("s", entry(base)).shape == (128, 256)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_type": "int4"},
        {"quant_type": None},
        {"quant_type": ["nf4"]},
        {"blocksize": 0},
        {"blocksize": -64},
        {"blocksize": 63},
        {"blocksize": 64.0},
        {"blocksize": True},
        {"blocksize": "64"},
        {"blocksize": 10**30},
        {"dtype": "float64"},
        {"dtype": "load"},
        {"dtype": 32},
        {"dtype": ["float32"]},
        {"shape": None},
        {"shape": []},
        {"shape": [128]},
        {"shape": [128, 256, 1]},
        {"shape": [128, -256]},
        {"shape": [0, 256]},
        {"shape": [128.0, 256.0]},
        {"shape": [True, 256]},
        {"shape": "128x256"},
        {"shape": {"0": 128, "1": 256}},
        {"nested_blocksize": 0},
        {"nested_blocksize": None},
        {"nested_dtype": "uint8"},
        {"nested_dtype": None},
        {"nested_offset": None},
        {"nested_offset": "0.2"},
        {"nested_offset": True},
        {"nested_offset": 1e39},
        {"nested_offset": -(10**60)},
    ],
    ids=str,
)
def test_impossible_values_are_refused_by_key(change):
    (key,) = change
    with pytest.raises(LayoutError, match=f"entry 'the-entry' says {key}="):
        read_state("the-entry", entry({**NESTED, **change}))


@pytest.mark.parametrize("key", sorted(NESTED))
def test_missing_keys_are_refused(key):
    with pytest.raises(LayoutError, match=f"missing .*{key}"):
        read_state("s", entry({k: v for k, v in NESTED.items() if k != key}))


def test_unknown_keys_are_refused():
    with pytest.raises(LayoutError, match=r"unknown .*__class__"):
        read_state("s", entry({**GOOD, "__class__": "os.system"}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "64",
        '"nf4"',
        "[" * 1000,
        '{"a":' * 200,
        "[" * 5000,
        json.dumps(NESTED)[:-1],
        json.dumps(NESTED) + " x",
        json.dumps(NESTED) + " " * 1000,
        json.dumps(GOOD).replace("64", "NaN"),
        json.dumps(NESTED).replace("0.21103382110595703", "Infinity"),
        json.dumps(NESTED).replace("0.21103382110595703", "-Infinity"),
        json.dumps(NESTED).replace("0.21103382110595703", "NaN"),
        json.dumps(NESTED).replace("0.21103382110595703", "1e999"),
        json.dumps(GOOD).replace("64", "9" * 900),
        json.dumps(GOOD)[:-1] + ', "blocksize": 32}',
        b"\xff\xfe{}",
        b"\x80\x04\x95cos\nsystem\n.",
    ],
    ids=range(21),
)
def test_hostile_text_is_refused(text):
    with pytest.raises(LayoutError, match="the-entry"):
        read_state("the-entry", entry(text))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(170, dtype=torch.int8),
        torch.zeros(170),
        torch.zeros(1, 170, dtype=torch.uint8),
        torch.zeros((), dtype=torch.uint8),
        torch.zeros(1 << 20, dtype=torch.uint8),
    ],
    ids=["int8", "float", "2-d", "0-d", "long"],
)
def test_other_tensors_are_refused_before_they_are_parsed(tensor):
    with pytest.raises(LayoutError, match="expected 1 to 1024 bytes"):
        read_state("the-entry", tensor)
