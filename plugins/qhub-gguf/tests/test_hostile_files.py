"""Files that lie: one clear error that names the file and the tensor or key, before anything is allocated."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qhub_gguf.container import GgufFile
from qhub_gguf.metadata import config_of, tokenizer_of

from qhub.errors import CheckpointError, QhubError


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, raw: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + raw


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(entries: list[bytes] = [], tensors: list[bytes] = [], data: bytes = b"", **claims: int) -> bytes:  # noqa: B006
    """Return a file; ``claims``: numbers of its head that are not true."""
    head = struct.pack(
        "<4sIQQ",
        b"GGUF",
        claims.get("version", 3),
        claims.get("tensor_count", len(tensors)),
        claims.get("entry_count", len(entries)),
    )
    content = head + b"".join(entries) + b"".join(tensors)
    return content + bytes(-len(content) % 32) + data


U32, STRING, ARRAY, BOOL = 4, 8, 9, 7

CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file"),
    "another format": (b"PK\x03\x04 something", "is no GGUF file"),
    "magic only": (b"GGUF", "ends at byte 4, in the version"),
    "version 1": (gguf(version=1), "is GGUF version 1"),
    "version 4": (gguf(version=4), "is GGUF version 4"),
    "big-endian": (gguf(version=0x03000000), "is a big-endian GGUF file"),
    "2^60 tensors": (gguf(tensor_count=2**60), "claims 1152921504606846976 tensors"),
    "2^60 entries": (gguf(entry_count=2**60), "claims 1152921504606846976 metadata entries"),
    "a key of 2^60 bytes": (
        gguf([struct.pack("<Q", 2**60) + b"abc" * 9]),
        "the key of metadata entry 0 at byte 32 claims 1152921504606846976 bytes",
    ),
    "a string of 2^60 bytes": (
        gguf([entry("k", STRING, struct.pack("<Q", 2**60) + b"a" * 64)]),
        r"metadata key 'k' at byte \d+ claims 1152921504606846976",
    ),
    "a string of 2^64 - 1 bytes": (gguf([entry("k", STRING, struct.pack("<Q", 2**64 - 1) + b"a" * 64)]), "key 'k'"),
    "an array of 2^60 strings": (
        gguf([entry("k", ARRAY, struct.pack("<IQ", STRING, 2**60) + b"a" * 64)]),
        "claims 1152921504606846976 strings of metadata key 'k'",
    ),
    "an array of 2^60 numbers": (
        gguf([entry("k", ARRAY, struct.pack("<IQ", U32, 2**60) + b"a" * 64)]),
        "claims 1152921504606846976 elements of metadata key 'k'",
    ),
    "a long string in an array": (
        gguf([entry("k", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + struct.pack("<Q", 2**60) + bytes(64))]),
        "string 1 of metadata key 'k' claims",
    ),
    "arrays of arrays": (
        gguf([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", ARRAY, 1) * 9)]),
        "'k' is an array of arrays",
    ),
    "an unknown kind": (gguf([entry("k", 99, bytes(64))]), "metadata key 'k' has the unknown value type 99"),
    "an unknown kind in an array": (
        gguf([entry("k", ARRAY, struct.pack("<IQ", 13, 1) + bytes(64))]),
        "the elements of metadata key 'k' has the unknown value type 13",
    ),
    "a bool of 2": (gguf([entry("k", BOOL, b"\x02")]), "'k' is a bool and holds"),
    "a key twice": (gguf([entry("k", BOOL, b"\x01")] * 2), "the metadata key 'k' twice"),
    "a key that is no text": (gguf([string(b"\xff\xfe") + bytes(9)]), "is not UTF-8"),
    "an alignment of 0": (
        gguf([entry("general.alignment", U32, bytes(4))]),
        "general.alignment must be a power of two",
    ),
    "an alignment of 24": (
        gguf([entry("general.alignment", U32, struct.pack("<I", 24))]),
        "general.alignment must be a power of two",
    ),
    "an alignment of another kind": (
        gguf([entry("general.alignment", STRING, string("32"))]),
        "general.alignment must be a power of two",
    ),
    "a tensor twice": (gguf([], [tensor("x", (4,), 0, 0)] * 2, bytes(64)), "the tensor 'x' twice"),
    "an unknown type": (gguf([], [tensor("x", (4,), 77, 0)], bytes(64)), "tensor 'x' has the unknown ggml type 77"),
    "a type given up": (
        gguf([], [tensor("x", (4,), 31, 0)], bytes(64)),
        r"tensor 'x' has the unknown ggml type 31 \(Q4_0_4_4, which llama.cpp has given up\)",
    ),
    "five dimensions": (gguf([], [tensor("x", (1,) * 5, 0, 0)], bytes(64)), "tensor 'x' claims 5 dimensions"),
    "2^31 dimensions": (
        gguf([], [string("x") + struct.pack("<I", 2**31) + bytes(64)], bytes(64)),
        "tensor 'x' claims 2147483648 dimensions",
    ),
    "an overflowing shape": (
        gguf([], [tensor("x", (2**40, 2**40), 0, 0)], bytes(64)),
        "'x': its shape .* has more elements",
    ),
    "half a block": (gguf([], [tensor("x", (48, 2), 2, 0)], bytes(64)), "'x': its rows have 48 weights.*Q4_0"),
    "a misaligned tensor": (gguf([], [tensor("x", (4,), 0, 8)], bytes(64)), "'x' begins at 8"),
    "a tensor beyond the end": (gguf([], [tensor("x", (4,), 0, 2**62)], bytes(64)), "'x' .*truncated or damaged"),
    "a tensor larger than the file": (gguf([], [tensor("x", (2**33,), 0, 0)], bytes(64)), "'x' .*truncated or damaged"),
    "overlapping tensors": (
        gguf([], [tensor("x", (16,), 0, 0), tensor("y", (16,), 0, 32)], bytes(128)),
        "tensors 'x' and 'y' overlap",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_lies_are_told_apart(case: str, tmp_path: Path) -> None:
    content, message = CASES[case]
    path = tmp_path / "evil.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            GgufFile.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "evil.gguf" in str(caught.value)
    assert peak < 2**20 and time.perf_counter() - begun < 2


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf"):
        GgufFile.open(tmp_path / "none.gguf")


def use(path: Path) -> None:
    """Do what loading does with a file."""
    file = GgufFile.open(path)
    for value in file.metadata.values():
        _ = value.data
    for name in file.tensors:
        file.tensor(name)
    for read in (config_of, tokenizer_of):
        _attempt(read, file)


def _attempt(read: Callable[[GgufFile], object], file: GgufFile) -> None:
    try:
        read(file)
    except QhubError as error:
        assert str(error)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files(share: float, data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = (data / "quantized.gguf").read_bytes()
    path = tmp_path_factory.mktemp("short") / "a.gguf"
    # The padding of the last tensor may be missing.
    path.write_bytes(content[: int(share * (len(content) - 32))])
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        GgufFile.open(path)


@settings(max_examples=150, deadline=None)
@example(changes=[(790, 128)])  # a token that is no UTF-8
@given(changes=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_files(changes: list[tuple[int, int]], data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any byte of the head may be wrong: the file opens, or one error says what is wrong."""
    content = bytearray((data / "quantized.gguf").read_bytes())
    for place, byte in changes:
        content[place] = byte
    path = tmp_path_factory.mktemp("damaged") / "a.gguf"
    path.write_bytes(content)
    try:
        use(path)
    except CheckpointError as error:
        assert "a.gguf" in str(error)
