"""The types of every tensor, against what llama.cpp itself would choose (data/make_files.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from qhub_gguf.container import GgufFile
from qhub_gguf.mixes import FILE_TYPES, file_type_of, types_for

from qhub.errors import ConfigError

NAMES = ("llama", "tied", "odd", "mixtral", "falcon", "phi3")


@pytest.fixture(scope="module")
def mixes(data: Path) -> dict[str, Any]:
    return json.loads((data / "mixes.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_every_file_type(name: str, mixes: dict[str, Any]) -> None:
    model = mixes[name]
    config = getattr(transformers, model["class"])(**model["settings"])
    shapes = {tensor: tuple(shape) for tensor, shape in model["shapes"].items()}
    assert len(model["types"]) >= 2 * len(FILE_TYPES) - 2
    for key, expected in model["types"].items():
        file_type, _, importance = key.partition(" ")
        found = types_for(file_type, config, shapes, importance=bool(importance))
        assert found == dict(zip(shapes, expected.split(), strict=True)), key


def test_a_file_that_llama_cpp_wrote(data: Path, tiny: Any) -> None:
    file = GgufFile.open(data / "quantized.gguf")
    shapes = {name: info.shape for name, info in file.tensors.items()}
    found = types_for(file.get("general.file_type"), tiny("llama").config, shapes)
    assert found == {name: info.type.name for name, info in file.tensors.items()}


def test_overrides(mixes: dict[str, Any]) -> None:
    model = mixes["llama"]
    config = transformers.LlamaConfig(**model["settings"])
    shapes = {name: tuple(shape) for name, shape in model["shapes"].items()}
    overrides = {r"blk\.0\.": "q8_0", "ffn_down": "Q5_K", "norm": "Q8_0", "output": "F16"}
    found = types_for("Q4_K_M", config, shapes, overrides=overrides)
    assert found["blk.0.ffn_down.weight"] == found["blk.0.attn_q.weight"] == "Q8_0"
    assert found["blk.5.ffn_down.weight"] == "Q5_K" and found["output.weight"] == "F16"
    assert found["blk.0.attn_norm.weight"] == "F32" and found["blk.5.attn_q.weight"] == "Q4_K"
    odd = mixes["odd"]
    narrow = {name: tuple(shape) for name, shape in odd["shapes"].items()}
    wished = types_for("F16", transformers.LlamaConfig(**odd["settings"]), narrow, overrides={"ffn_down": "Q4_K"})
    assert wished["blk.0.ffn_down.weight"] == "Q5_0" and wished["blk.0.ffn_up.weight"] == "F16"


def test_names_of_file_types() -> None:
    assert file_type_of("q4_k").name == "Q4_K_M" and file_type_of(15).name == "Q4_K_M"
    with pytest.raises(ConfigError, match="no GGUF file type 'Q4_Z'.*Q4_K_M"):
        file_type_of("Q4_Z")
    with pytest.raises(ConfigError, match="no ggml type 'Q4_Z'"):
        types_for("Q4_0", None, {}, overrides={"a": "Q4_Z"})
    with pytest.raises(ConfigError, match="is no regular expression"):
        types_for("Q4_0", None, {}, overrides={"(": "Q4_0"})
