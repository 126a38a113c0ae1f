"""Importance matrices in both of llama.cpp's forms."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_gguf.container import Kind, TensorSource, Value, write
from qhub_gguf.imatrix import ImportanceMatrix
from qhub_gguf.names import Mapping

from qhub.errors import CheckpointError


@pytest.fixture
def matrix() -> ImportanceMatrix:
    values = {"blk.0.attn_q.weight": torch.rand(32), "blk.0.ffn_up_exps.weight": torch.rand(4, 16)}
    values["blk.0.ffn_up_exps.weight"][2] = 0
    counts = {"blk.0.attn_q.weight": torch.tensor(1024), "blk.0.ffn_up_exps.weight": torch.tensor([512, 7, 0, 900])}
    return ImportanceMatrix(values, counts, ("wiki.txt",))


def test_the_gguf_form(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    matrix.write(tmp_path / "a.gguf")
    found = ImportanceMatrix.read(tmp_path / "a.gguf")
    assert found.datasets == ("wiki.txt",) and found.chunk == 512 and found.chunks == 2
    for name, values in matrix.values.items():
        torch.testing.assert_close(found.values[name], values, rtol=1e-6, atol=0)
        assert torch.equal(found.counts[name], matrix.counts[name])
    unseen = found.of("blk.0.ffn_up_exps.weight", 16)
    assert unseen is not None and torch.equal(unseen[2], torch.ones(16))
    assert found.of("another", 16) is None
    with pytest.raises(CheckpointError, match=r"16 features for 'blk\.0\.ffn_up_exps\.weight'"):
        found.of("blk.0.ffn_up_exps.weight", 32)


def test_the_gguf_form_is_llama_cpps(tmp_path: Path) -> None:
    """Sums of squares and counts under the names that llama.cpp's loader asks for."""
    values = torch.tensor([1.0, 2.0])
    ImportanceMatrix({"a.weight": values}, {"a.weight": torch.tensor(3)}).write(tmp_path / "a.gguf")
    from qhub_gguf.container import GgufFile

    file = GgufFile.open(tmp_path / "a.gguf")
    assert torch.equal(file.tensor("a.weight.in_sum2"), torch.tensor([[3.0, 6.0]]))
    assert torch.equal(file.tensor("a.weight.counts"), torch.tensor([[3.0]]))
    assert file.get("general.type") == "imatrix" and file.get("imatrix.chunk_size") == 512
    assert file.get("imatrix.datasets") == []


def test_the_old_form(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    matrix.write(tmp_path / "a.dat")
    found = ImportanceMatrix.read(tmp_path / "a.dat")
    torch.testing.assert_close(found.values["blk.0.attn_q.weight"], matrix.values["blk.0.attn_q.weight"])
    # Experts lie one after the other, those that saw nothing as ones.
    experts = matrix.of("blk.0.ffn_up_exps.weight", 16)
    assert experts is not None
    torch.testing.assert_close(found.values["blk.0.ffn_up_exps.weight"], experts.flatten())
    assert found.datasets == ("wiki.txt",)
    name = b"x.weight"
    # As save_imatrix_legacy writes it: a value for 4 calls is 4 times the mean.
    old = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii2f", 4, 2, 4.0, 8.0)
    (tmp_path / "b.dat").write_bytes(old)
    assert torch.equal(ImportanceMatrix.read(tmp_path / "b.dat").values["x.weight"], torch.tensor([1.0, 2.0]))


def test_from_statistics(tiny: Callable[[str], Any]) -> None:
    mapping = Mapping.for_config(tiny("qwen3_5_moe").config)
    stacked, out = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.linear_attn.out_proj.weight"
    squares = {stacked: torch.rand(4, 32), out: torch.rand(32)}
    found = ImportanceMatrix.from_statistics(squares, {stacked: torch.ones(4), out: torch.tensor(9)}, mapping)
    assert set(found.values) == {
        "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight", "blk.0.ssm_out.weight"
    }  # fmt: skip
    assert torch.equal(found.values["blk.0.ffn_up_exps.weight"], squares[stacked])
    # Features follow the columns of the file.
    entry = mapping.of_model([out])[out][0]
    assert torch.equal(found.values["blk.0.ssm_out.weight"], entry.to_file(squares[out].view(1, -1))[0])
    assert not torch.equal(found.values["blk.0.ssm_out.weight"], squares[out])


def test_bad_files(tmp_path: Path, matrix: ImportanceMatrix) -> None:
    matrix.write(tmp_path / "good.dat")
    content = (tmp_path / "good.dat").read_bytes()
    path = tmp_path / "a.dat"
    name = b"x.weight"
    not_finite = struct.pack("<ii", 1, len(name)) + name + struct.pack("<iif", 1, 1, float("nan"))
    for bad, message in (
        (content[:50], r"a\.dat is a truncated"),
        (struct.pack("<i", 2**30), "claims 1073741824 entries"),
        (struct.pack("<ii", 1, -5) + bytes(20), "claims -5 bytes"),
        (not_finite, "'x.weight' is not finite"),
        (b"", "truncated"),
    ):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=message):
            ImportanceMatrix.read(path)
    one = TensorSource("F32", (1, 2), torch.ones(1, 2))
    write(tmp_path / "b.gguf", {"general.type": Value.of(Kind.STRING, "imatrix")}, {"x.weight.in_sum2": one})
    with pytest.raises(CheckpointError, match=r"'x\.weight\.counts' is missing"):
        ImportanceMatrix.read(tmp_path / "b.gguf")
    write(tmp_path / "c.gguf", {"general.type": Value.of(Kind.STRING, "model")}, {})
    with pytest.raises(CheckpointError, match="of type 'model' and no importance matrix"):
        ImportanceMatrix.read(tmp_path / "c.gguf")
