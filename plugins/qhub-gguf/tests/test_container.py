"""The container: files of upstream byte for byte, views without copies, splitting, writing."""

from __future__ import annotations

import gc
import struct
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qhub_gguf.container import GgufFile, Kind, TensorSource, Value, write, write_like, write_split
from qhub_gguf.types import TYPES, type_of, type_of_dtype

from qhub.errors import CheckpointError, ConfigError


def sources(file: GgufFile) -> dict[str, TensorSource]:
    """Return all tensors of ``file`` for a writer, read when their turn comes."""
    return {
        name: TensorSource(info.type.name, info.shape, lambda name=name: file.tensor(name))  # type: ignore[misc]
        for name, info in file.tensors.items()
    }


def test_an_unchanged_file_is_written_byte_for_byte(data: Path, tmp_path: Path) -> None:
    """quantized.gguf is what llama.cpp wrote."""
    original = data / "quantized.gguf"
    file = GgufFile.open(original)
    write_like(tmp_path / "like.gguf", file)
    write(tmp_path / "anew.gguf", file.metadata, sources(file))
    assert (tmp_path / "like.gguf").read_bytes() == original.read_bytes()
    assert (tmp_path / "anew.gguf").read_bytes() == original.read_bytes()


def test_a_split_file_is_one_and_is_written_byte_for_byte(data: Path, tmp_path: Path) -> None:
    """split/ is what gguf-py's writer made of quantized.gguf."""
    parts = sorted((data / "split").iterdir())
    whole = GgufFile.open(data / "quantized.gguf")
    for part in parts:
        file = GgufFile.open(part)
        assert file.paths == parts and set(file.tensors) == set(whole.tensors)
        for name in whole.tensors:
            assert torch.equal(file.tensor(name), whole.tensor(name))
    written = write_like(tmp_path / "model.gguf", file)
    assert [path.name for path in written] == [part.name for part in parts]
    assert [path.read_bytes() for path in written] == [part.read_bytes() for part in parts]


def test_a_split_file_without_one_part_names_it(data: Path, tmp_path: Path) -> None:
    for part in (data / "split").iterdir():
        if "00002" not in part.name:
            (tmp_path / part.name).write_bytes(part.read_bytes())
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.gguf'\] are missing"):
        GgufFile.open(tmp_path / "model-00001-of-00003.gguf")
    (tmp_path / "renamed.gguf").write_bytes((tmp_path / "model-00001-of-00003.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="must be named like model-00001-of-00003"):
        GgufFile.open(tmp_path / "renamed.gguf")


def test_parts_that_are_not_of_one_model(data: Path, tmp_path: Path) -> None:
    parts = [part.read_bytes() for part in sorted((data / "split").iterdir())]
    for number, content in enumerate((parts[0], parts[2], parts[1]), start=1):
        (tmp_path / f"model-0000{number}-of-00003.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf should be part 1 of 3 and says split\.no = 2"):
        GgufFile.open(tmp_path / "model-00001-of-00003.gguf")


def test_splitting_by_size(data: Path, tmp_path: Path) -> None:
    file = GgufFile.open(data / "quantized.gguf")
    paths = write_split(tmp_path / "model.gguf", file.metadata, sources(file), max_bytes=4096)
    assert len(paths) > 2 and paths[0].name == f"model-00001-of-{len(paths):05d}.gguf"
    again = GgufFile.open(paths[1])
    assert list(again.tensors) == list(file.tensors)
    assert all(torch.equal(again.tensor(name), file.tensor(name)) for name in file.tensors)
    assert again.get("split.count") == len(paths) and again.metadata["split.tensors.count"].kind is Kind.INT32
    assert again.get("llama.block_count") == 2
    assert write_split(tmp_path / "one.gguf", file.metadata, sources(file), 10**9) == [tmp_path / "one.gguf"]


def test_gguf_py_reads_what_is_written(data: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = GgufFile.open(data / "quantized.gguf")
    write(tmp_path / "a.gguf", file.metadata, sources(file))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert [tensor.name for tensor in reader.tensors] == list(file.tensors)
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == file.tensors[tensor.name].type.name
        assert tensor.data.tobytes() == bytes(file.tensor(tensor.name).numpy().data)
    for key, value in file.metadata.items():
        assert reader.fields[key].contents() == value.data


def test_tensors_are_views_of_the_file(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    content = (data / "quantized.gguf").read_bytes()
    path.write_bytes(content)
    file = GgufFile.open(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = file.tensor("token_embd.weight"), file.tensor("token_embd.weight")
    assert first.data_ptr() == second.data_ptr()
    info = file.tensors["token_embd.weight"]
    assert first.dtype == torch.uint8 and first.shape == info.packed_shape == (64, info.type.row_bytes(32))
    # Writing changes memory, not the file; the mapping outlives the object and a replacement of the file.
    first.zero_()
    norm, expected = file.tensor("output_norm.weight"), file.tensor("output_norm.weight").clone()
    (tmp_path / "other").write_bytes(b"something else")
    (tmp_path / "other").replace(path)
    del file, second
    gc.collect()
    assert torch.equal(norm, expected) and int(first.sum()) == 0
    assert path.read_bytes() == b"something else"


def test_writing_over_the_source(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes((data / "quantized.gguf").read_bytes())
    file = GgufFile.open(path)
    ones = TensorSource("F32", (32,), torch.ones(32))
    write_like(path, file, {"output_norm.weight": ones})
    again = GgufFile.open(path)
    assert torch.equal(again.tensor("output_norm.weight"), torch.ones(32))
    assert torch.equal(again.tensor("blk.0.attn_q.weight"), file.tensor("blk.0.attn_q.weight"))
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match=r"\['nothing'\]"):
        write_like(path, file, {"nothing": ones})


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    good = TensorSource("F32", (4,), torch.ones(4))
    for bad, message in (
        (TensorSource("F32", (4,), torch.ones(5)), "takes 16 bytes"),
        (TensorSource("F16", (4,), torch.ones(2)), "takes 8 bytes of torch.float16"),
        (TensorSource("Q4_0", (40,), torch.ones(2)), "no multiple of Q4_0's blocks of 32"),
        (TensorSource("Q9", (4,), torch.ones(4)), "no ggml type 'Q9'"),
        (TensorSource("F32", (1, 1, 1, 1, 4), torch.ones(4)), "at most 4"),
    ):
        with pytest.raises(CheckpointError, match=f"'bad'.*{message}"):
            write(path, {}, {"good": good, "bad": bad})
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match="cannot write"):
        write(tmp_path / "missing/a.gguf", {}, {"good": good})


@pytest.mark.parametrize(
    "kind", [kind for kind in TYPES.values() if kind.dtype is not None], ids=lambda kind: kind.name
)
def test_plain_types(kind: object, tmp_path: Path) -> None:
    dtype = kind.dtype  # type: ignore[attr-defined]
    tensor = torch.arange(6).to(dtype).view(2, 3)
    write(tmp_path / "a.gguf", {}, {"x": TensorSource(kind.name, (2, 3), tensor)})  # type: ignore[attr-defined]
    found = GgufFile.open(tmp_path / "a.gguf").tensor("x")
    assert found.dtype == dtype and torch.equal(found, tensor)
    assert type_of_dtype(dtype) is kind and type_of(kind.id) is kind  # type: ignore[attr-defined]


def test_types_are_gguf_pys() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {name: (kind.id, kind.count, kind.size) for name, kind in TYPES.items()}
    assert {name: value for name, value in ours.items() if name in theirs} == theirs


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment(alignment: int, tmp_path: Path) -> None:
    metadata = {"general.alignment": Value.of(Kind.UINT32, alignment)}
    tensors = {name: TensorSource("F32", (3,), torch.full((3,), float(number))) for number, name in enumerate("abc")}
    write(tmp_path / "a.gguf", metadata, tensors)
    file = GgufFile.open(tmp_path / "a.gguf")
    assert file.alignment == alignment and all(info.offset % alignment == 0 for info in file.tensors.values())
    for number, name in enumerate("abc"):
        assert torch.equal(file.tensor(name), torch.full((3,), float(number)))


def test_files_without_tensors_and_empty_tensors(tmp_path: Path) -> None:
    write(
        tmp_path / "a.gguf", {"k": Value.of(Kind.BOOL, True)}, {"none": TensorSource("F32", (0, 4), torch.empty(0, 4))}
    )
    file = GgufFile.open(tmp_path / "a.gguf")
    assert file.tensor("none").shape == (0, 4) and file.get("k") is True
    write(tmp_path / "b.gguf", {}, {})
    assert not GgufFile.open(tmp_path / "b.gguf").tensors
    with pytest.raises(CheckpointError, match=r"b\.gguf has no tensor 'x'"):
        GgufFile.open(tmp_path / "b.gguf").tensor("x")


def test_the_data_of_the_last_tensor_may_end_the_file(data: Path, tmp_path: Path) -> None:
    file = GgufFile.open(data / "quantized.gguf")
    write(tmp_path / "a.gguf", {}, {"x": TensorSource("I8", (3,), torch.ones(3, dtype=torch.int8))})
    shorter = (tmp_path / "a.gguf").read_bytes()[:-29]
    (tmp_path / "b.gguf").write_bytes(shorter)
    write_like(tmp_path / "c.gguf", GgufFile.open(tmp_path / "b.gguf"))
    assert (tmp_path / "c.gguf").read_bytes() == shorter
    assert file.headers[0].padded


_NUMBERS = {
    Kind.UINT8: st.integers(0, 2**8 - 1),
    Kind.INT8: st.integers(-(2**7), 2**7 - 1),
    Kind.UINT16: st.integers(0, 2**16 - 1),
    Kind.INT16: st.integers(-(2**15), 2**15 - 1),
    Kind.UINT32: st.integers(0, 2**32 - 1),
    Kind.INT32: st.integers(-(2**31), 2**31 - 1),
    Kind.FLOAT32: st.floats(width=32, allow_nan=False),
    Kind.BOOL: st.booleans(),
    Kind.STRING: st.text(),
    Kind.UINT64: st.integers(0, 2**64 - 1),
    Kind.INT64: st.integers(-(2**63), 2**63 - 1),
    Kind.FLOAT64: st.floats(allow_nan=False),
}
_SCALARS = st.one_of([st.builds(Value.of, st.just(kind), data) for kind, data in _NUMBERS.items()])
_ARRAYS = st.one_of(
    [
        st.builds(Value.of, st.just(Kind.ARRAY), st.lists(data, max_size=5), st.just(kind))
        for kind, data in _NUMBERS.items()
    ]
)


@given(values=st.dictionaries(st.text(min_size=1), st.one_of(_SCALARS, _ARRAYS), max_size=6))
def test_values_round_trip(values: dict[str, Value], tmp_path_factory: pytest.TempPathFactory) -> None:
    values.pop("general.alignment", None)
    path = tmp_path_factory.mktemp("values") / "a.gguf"
    write(path, values, {})
    found = GgufFile.open(path).metadata
    assert list(found) == list(values) and found == values
    assert [value.data for value in found.values()] == [value.data for value in values.values()]


def test_strings_that_are_not_utf8_survive() -> None:
    raw = struct.pack("<Q", 3) + b"a\xff\xed"
    value = Value(Kind.STRING, raw)
    assert Value.of(Kind.STRING, value.data) == value


def test_values_are_inferred_as_the_converter_does() -> None:
    assert [Value.infer(data).kind for data in ("a", True, 3, -3, 2**40, 1.5)] == [
        Kind.STRING, Kind.BOOL, Kind.UINT32, Kind.INT32, Kind.INT64, Kind.FLOAT32
    ]  # fmt: skip
    assert Value.infer([1, 2]).element is Kind.INT32 and Value.infer(["a"]).element is Kind.STRING
    with pytest.raises(ConfigError, match="UINT8 cannot hold '300'"):
        Value.of(Kind.UINT8, 300)
    with pytest.raises(ConfigError, match="cannot hold"):
        Value.infer({"a": 1})
