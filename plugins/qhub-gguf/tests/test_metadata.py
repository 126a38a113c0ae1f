"""Hyperparameters and configs, against files that llama.cpp's own converter made of the same models."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_gguf.container import GgufFile, Kind, TensorSource, Value, write, write_like
from qhub_gguf.metadata import config_of, extra_tensors, hyperparameters, metadata_of, size_label
from qhub_gguf.metadata.rope import llama3_factors, llama3_settings
from qhub_gguf.names import Entry, Mapping, architecture_of

from qhub.errors import CheckpointError, UnsupportedError


def save(model: Any, path: Path, without: tuple[str, ...] = ()) -> GgufFile:
    """Write ``model`` as a file of F32 tensors, without some metadata keys, and open it."""
    mapping, state = Mapping.for_config(model.config), model.state_dict()
    names = [name for name in state if not (name == "lm_head.weight" and model.config.tie_word_embeddings)]
    tensors = {e.ggml: e.to_file(state[name]) for name, found in mapping.of_model(names).items() for e in found}
    tensors |= extra_tensors(model.config, mapping.architecture)
    metadata = {key: value for key, value in metadata_of(model.config, file_type=0).items() if key not in without}
    write(path, metadata, {name: TensorSource("F32", tuple(t.shape), t.float()) for name, t in tensors.items()})
    return GgufFile.open(path)


def test_hyperparameters_are_the_converters(tiny: Callable[[str], Any], model_name: str, data: Path) -> None:
    expected = json.loads((data / "converter.json").read_text())[model_name]
    config = tiny(model_name).config
    found = {
        key.removeprefix(f"{expected['architecture']}."): value
        for key, value in hyperparameters(config, expected["architecture"]).items()
    }
    assert {key: [_kind(value), value.data] for key, value in found.items()} == {
        key: [kind, value] for key, (kind, value) in expected["values"].items() if key != "general.file_type"
    }


def _kind(value: Value) -> str:
    return value.kind.name if value.element is None else f"{value.kind.name}/{value.element.name}"


def test_a_file_alone_gives_the_model_back(tiny: Callable[[str], Any], model_name: str, tmp_path: Path) -> None:
    """Config and weights out of the file, nothing else: equal logits."""
    import transformers

    model = tiny(model_name)
    if model_name == "t5encoder":
        model.config.architectures = ["T5EncoderModel"]
    file = save(model, tmp_path / "model.gguf")
    settings = config_of(file)
    config = transformers.CONFIG_MAPPING[settings.pop("model_type")](**settings)
    copy = getattr(transformers, settings["architectures"][0])(config).eval()
    parameters = Mapping.for_config(config, architecture_of(file)).of_file(file.tensors)
    weights = {
        name: Entry.assembled(entries, [file.tensor(entry.ggml) for entry in entries])
        for name, entries in parameters.items()
    }
    assert not copy.load_state_dict(weights, strict=False).unexpected_keys
    copy.tie_weights()
    ids = torch.arange(3, 43).view(2, 20) % 64
    more = {"decoder_input_ids": ids} if "Conditional" in settings["architectures"][0] else {}
    with torch.no_grad():
        expected, found = model(ids, **more)[0], copy(ids, **more)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6 * float(expected.abs().max()))


def test_general_entries(tiny: Callable[[str], Any]) -> None:
    model = tiny("llama")
    more = {"general.license": Value.of(Kind.STRING, "mit")}
    metadata = metadata_of(model.config, file_type=15, name="tiny", label=size_label(26_200_000), more=more)
    keys = list(metadata)
    assert keys[:5] == [
        "general.architecture", "general.type", "general.name", "general.size_label", "general.license"
    ]  # fmt: skip
    assert metadata["general.file_type"] == Value.of(Kind.UINT32, 15)
    assert metadata["general.size_label"].data == "26M"
    assert metadata["general.quantization_version"] == Value.of(Kind.UINT32, 2)


def test_size_labels() -> None:
    counts = (268_000_000, 8_030_000_000, 1_100_000_000, 5_200_000, 900)
    assert [size_label(count) for count in counts] == ["268M", "8.0B", "1.1B", "5.2M", "0.9K"]


def test_llama3_scaling_is_found_in_its_factors() -> None:
    factors = llama3_factors(64, 500000.0, 32.0, 1.0, 4.0, 8192)
    assert float(factors.min()) == 1 and float(factors.max()) == 32
    assert llama3_settings(factors, 500000.0, 131072) == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert llama3_settings(factors * 1.01, 500000.0, 131072) is None


def test_files_without_compulsory_keys(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    file = save(tiny("llama"), tmp_path / "a.gguf", without=("llama.block_count",))
    with pytest.raises(CheckpointError, match=r"a\.gguf: the metadata key llama\.block_count is missing"):
        config_of(file)


def test_files_with_values_of_the_wrong_kind(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": Value.of(Kind.STRING, "llama"),
        "llama.block_count": Value.of(Kind.STRING, "many"),
    }
    write(tmp_path / "a.gguf", metadata, {})
    with pytest.raises(CheckpointError, match=r"llama\.block_count must be a count, found many"):
        config_of(GgufFile.open(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    "key", ["block_count", "attention.key_length", "attention.head_count", "rope.dimension_count", "embedding_length"]
)
def test_sizes_that_no_tensor_has(key: str, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """A model is not built from a claim."""
    file = save(tiny("llama"), tmp_path / "a.gguf")
    metadata = {**file.metadata, f"llama.{key}": Value.of(Kind.UINT32, 2**31)}
    write_like(tmp_path / "b.gguf", file, metadata=metadata)
    with pytest.raises(CheckpointError, match=rf"b\.gguf: llama\.{key} is 2147483648, and no tensor"):
        config_of(GgufFile.open(tmp_path / "b.gguf"))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gemma4", "attention.sliding_window_pattern", Value.of(Kind.ARRAY, [True], Kind.BOOL)),
        ("gemma4", "attention.head_count_kv", Value.of(Kind.ARRAY, [2, 2, 2], Kind.INT32)),
        ("lfm2", "attention.head_count_kv", Value.of(Kind.UINT32, 2)),
        ("qwen3_5", "ssm.time_step_rank", Value.of(Kind.UINT32, 0)),
        ("mamba", "embedding_length", Value.of(Kind.UINT32, 0)),
    ],
)
def test_metadata_that_contradicts_itself(
    name: str, key: str, value: Value, tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    file = save(tiny(name), tmp_path / "a.gguf")
    architecture = file.get("general.architecture")
    write_like(tmp_path / "b.gguf", file, metadata={**file.metadata, f"{architecture}.{key}": value})
    with pytest.raises(CheckpointError, match=rf"b\.gguf: .*{architecture}"):
        config_of(GgufFile.open(tmp_path / "b.gguf"))


def test_what_a_file_cannot_say_is_said(tiny: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> None:
    config = tiny("qwen3_moe").config
    config.norm_topk_prob = False
    with caplog.at_level(logging.WARNING):
        hyperparameters(config)
    assert "norm_topk_prob=False" in caplog.text
    falcon = tiny("falcon").config
    falcon.alibi = True
    with pytest.raises(UnsupportedError, match="alibi=True"):
        hyperparameters(falcon)
    llama = tiny("llama").config
    llama.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedError, match="'dynamic'"):
        hyperparameters(llama)
