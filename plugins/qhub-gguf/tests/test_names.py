"""Names and numbers of every architecture, against files that llama.cpp's own converter made of the same models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qhub_gguf.metadata import extra_tensors
from qhub_gguf.names import ARCHITECTURES, Entry, Mapping, architecture_of, architecture_of_config

from qhub.errors import CheckpointError, UnsupportedError


@pytest.fixture(scope="module")
def converter(data: Path) -> dict[str, Any]:
    """What convert_hf_to_gguf wrote (data/make_converter.py)."""
    return json.loads((data / "converter.json").read_text())  # type: ignore[no-any-return]


def written(model: Any) -> dict[str, torch.Tensor]:
    """Return all tensors of the file for ``model``, dense."""
    mapping = Mapping.for_config(model.config)
    state = model.state_dict()
    tied = [name for name in ("lm_head.weight",) if model.config.tie_word_embeddings]
    found = {
        entry.ggml: entry.to_file(state[name])
        for name, entries in mapping.of_model([name for name in state if name not in tied]).items()
        for entry in entries
    }
    return found | extra_tensors(model.config, mapping.architecture)


def test_the_file_is_the_converters(tiny: Callable[[str], Any], model_name: str, converter: dict[str, Any]) -> None:
    model, expected = tiny(model_name), converter[model_name]
    if model_name == "t5encoder":
        model.config.architectures = ["T5EncoderModel"]
    assert architecture_of_config(model.config) == expected["architecture"]
    tensors = written(model)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: shape for name, (shape, _) in expected["tensors"].items()
    }
    for name, tensor in tensors.items():
        # exp differs in the last bit between machines.
        if not name.endswith("ssm_a"):
            digest = hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()[:12]
            assert digest == expected["tensors"][name][1], name


def test_back_to_the_model(tiny: Callable[[str], Any], model_name: str) -> None:
    model = tiny(model_name)
    tensors, state = written(model), model.state_dict()
    mapping = Mapping.for_config(model.config)
    parameters = mapping.of_file(tensors)
    computed = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert set(state) - set(parameters) <= computed
    for name, entries in parameters.items():
        restored = Entry.assembled(entries, [tensors[entry.ggml] for entry in entries])
        if name.endswith("A_log"):
            torch.testing.assert_close(restored, state[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(restored, state[name]), name


def test_rows_of_packed_tensors(tiny: Callable[[str], Any], model_name: str) -> None:
    """Reordering the file's rows, and for one tensor the input, gives the parameter: what packed weights rely on."""
    model = tiny(model_name)
    tensors, state = written(model), model.state_dict()
    for name, entries in Mapping.for_config(model.config).of_file(tensors).items():
        entry = entries[0]
        if len(entries) > 1 or not entry.packable or tensors[entry.ggml].ndim != 2:
            continue
        rows, columns = entry.recipe.rows, entry.recipe.columns
        matrix = tensors[entry.ggml] if rows is None else tensors[entry.ggml][rows]
        x = torch.arange(matrix.shape[1]).double()
        given = x if columns is None else x[torch.argsort(columns)]
        parameter = state[name].mT if entry.recipe.transposed else state[name]
        torch.testing.assert_close(matrix.double() @ given, parameter.double() @ x, rtol=1e-12, atol=1e-9)


def test_classes_without_a_head(tiny: Callable[[str], Any]) -> None:
    model = tiny("llama")
    mapping = Mapping.for_config(model.config)
    assert set(mapping.of_model(model.model.state_dict(), prefix=False)) == set(model.model.state_dict())
    assert "layers.0.mlp.up_proj.weight" in mapping.of_file(["blk.0.ffn_up.weight"], prefix=False)


def test_gguf_py_has_the_same_names(tiny: Callable[[str], Any], model_name: str) -> None:
    gguf = pytest.importorskip("gguf")
    model = tiny(model_name)
    mapping = Mapping.for_config(model.config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == mapping.architecture)
    theirs = gguf.get_tensor_name_map(number, 2)
    compared = 0
    for name, entries in mapping.of_model([key for key in model.state_dict() if "lm_head" not in key]).items():
        expected = theirs.get_name(name, try_suffixes=(".weight", ".bias"))
        if expected is not None and len(entries) == 1:
            assert entries[0].ggml.removesuffix(".weight") == expected.removesuffix(".weight"), name
            compared += 1
    assert compared > 5


def test_mappings_of_files_that_are_not_right(tiny: Callable[[str], Any]) -> None:
    mapping = Mapping.for_config(tiny("mixtral").config)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_x\.weight' is none of those"):
        mapping.of_file(["blk.0.attn_x.weight"])
    with pytest.raises(CheckpointError, match="made of 2 tensors"):
        Entry.assembled(
            mapping.of_file(["blk.0.ffn_up_exps.weight"])["model.layers.0.mlp.experts.gate_up_proj"],
            [torch.ones(4, 48, 32)],
        )
    with pytest.raises(UnsupportedError, match=r"no tensor for 1 parameters.*my_layer"):
        mapping.of_model(["model.embed_tokens.weight", "my_layer.weight"])
    llama = Mapping.for_config(tiny("llama").config)
    entry = llama.entry("blk.0.attn_q.weight")
    assert entry is not None
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.weight' has 16 rows"):
        entry.to_model(torch.ones(16, 32))


def test_architectures_that_are_not_known() -> None:
    file = SimpleNamespace(path="a.gguf", get=lambda key: "clip")
    with pytest.raises(UnsupportedError, match=r"a\.gguf is a GGUF file of architecture 'clip'"):
        architecture_of(file)
    with pytest.raises(CheckpointError, match="does not say its architecture"):
        architecture_of(SimpleNamespace(path="a.gguf", get=lambda key: None))
    with pytest.raises(UnsupportedError, match="'bert' cannot be written"):
        architecture_of_config(SimpleNamespace(model_type="bert"))


def test_every_architecture_that_transformers_maps_is_there() -> None:
    modeling = pytest.importorskip("transformers.integrations.ggml")
    spelled = {"gpt_oss": "gpt-oss", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "minimax_m2": "minimax-m2"}
    spelled |= {"mistral": "llama", "umt5": "t5"}
    theirs = {spelled.get(name, name) for name in modeling.GGUF_CONFIG_MAPPING} - {"general", "tokenizer"}
    assert theirs <= set(ARCHITECTURES)
