"""Tokenizers through a file and back, against what llama.cpp makes of the same files (data/make_files.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_gguf.container import GgufFile, Kind, TensorSource, Value, write
from qhub_gguf.metadata import metadata_of, tokenizer_of, vocabulary
from tokenizers import Tokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from qhub.errors import CheckpointError, UnsupportedError

PRE = ("gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "bloom", "starcoder", "falcon")
OTHERS = ("sentencepiece", "sentencepiece-bare", "unigram")


def load(data: Path, name: str) -> PreTrainedTokenizerFast:
    stated = json.loads((data / "tokenizers" / f"{name}.json").read_text())
    tokenizer = Tokenizer.from_str(json.dumps(stated["tokenizer"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **stated["tokens"])


def save(tokenizer: Any, path: Path, **changed: Value) -> GgufFile:
    """Write ``tokenizer`` with three tokens to spare, and open the file."""
    rows = len(tokenizer) + 3
    config = LlamaConfig(vocab_size=rows, hidden_size=32, num_attention_heads=2, bos_token_id=None, eos_token_id=None)
    metadata = metadata_of(config, tokenizer, file_type=0)
    for key, value in changed.items():
        metadata[f"tokenizer.ggml.{key}"] = value
    write(path, metadata, {"token_embd.weight": TensorSource("F32", (rows, 32), torch.zeros(rows, 32))})
    return GgufFile.open(path)


@pytest.mark.parametrize("name", PRE + OTHERS)
def test_through_a_file_and_back(name: str, data: Path, tmp_path: Path) -> None:
    expected = json.loads((data / "tokenizers/ids.json").read_text())
    original = load(data, name)
    file = save(original, tmp_path / "a.gguf")
    backend, arguments = tokenizer_of(file)
    copy = PreTrainedTokenizerFast(tokenizer_object=backend, **arguments)
    for text, llama in zip(expected["texts"], expected["ids"][name], strict=True):
        ids = original(text)["input_ids"]
        # T5's character map makes a newline a space; without one, llama.cpp keeps it at the end of a text.
        assert ids == llama or (name == "unigram" and text.endswith("\n")), text
        assert copy(text)["input_ids"] == ids, text
        assert copy.decode(ids) == original.decode(ids)
    around = "<s>a<|im_start|>b <think> c</s>"
    if name in PRE:
        assert copy(around)["input_ids"] == original(around)["input_ids"]
    for token in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(copy, token) == getattr(original, token)


@pytest.mark.parametrize("name", PRE)
def test_the_name_of_the_splitting(name: str, data: Path, tmp_path: Path) -> None:
    assert save(load(data, name), tmp_path / "a.gguf").get("tokenizer.ggml.pre") == name


def test_entries(data: Path, tmp_path: Path) -> None:
    tokenizer = load(data, "sentencepiece")
    tokenizer.chat_template = "{{ messages }}"
    file = save(tokenizer, tmp_path / "a.gguf")
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    assert file.get("tokenizer.ggml.model") == "llama" and file.get("tokenizer.ggml.add_space_prefix") is True
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and types[:4] == [2, 3, 3, 6]
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]" and types[-3:] == [5, 5, 5]
    assert file.get("tokenizer.ggml.add_bos_token") is True and file.get("tokenizer.ggml.add_eos_token") is False
    assert [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert file.metadata["tokenizer.ggml.scores"].element is Kind.FLOAT32
    assert tokenizer_of(file)[1]["chat_template"] == "{{ messages }}"
    named = {"default": "a", "tool_use": "b"}
    tokenizer.chat_template = named
    entries = vocabulary(tokenizer, len(tokenizer), "llama")
    assert entries["tokenizer.chat_template"].data == "a" and entries["tokenizer.chat_template.tool_use"].data == "b"
    assert entries["tokenizer.chat_templates"].data == ["tool_use"]


@pytest.mark.parametrize(
    ("name", "begins"), [("sentencepiece", 1), ("llama-bpe", 0), ("tekken", 0), ("qwen2", None), ("gpt-2", None)]
)
def test_files_that_do_not_say_what_surrounds_a_text(name: str, begins: int | None, data: Path, tmp_path: Path) -> None:
    """llama.cpp assumes a beginning for SentencePiece, Llama 3 and Tekken."""
    file = save(load(data, name), tmp_path / "a.gguf")
    metadata = {key: value for key, value in file.metadata.items() if not key.endswith("add_bos_token")}
    write(tmp_path / "b.gguf", metadata, {})
    first = tokenizer_of(GgufFile.open(tmp_path / "b.gguf"))[0].encode("a").ids[0]
    assert (first == begins) is (begins is not None)


def test_what_llama_cpp_does_not_have(data: Path) -> None:
    tokenizer = load(data, "gpt-2")
    with pytest.raises(UnsupportedError, match="has token 360, and the embedding has 300 rows"):
        vocabulary(tokenizer, 300, "llama")
    from tokenizers import Regex, models, pre_tokenizers

    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[a-z]+"), "isolated"), last]
    )
    with pytest.raises(UnsupportedError, match=r"\[a-z\]\+"):
        vocabulary(tokenizer, 400, "llama")
    assert vocabulary(tokenizer, 400, "llama", pre="my-pre")["tokenizer.ggml.pre"].data == "my-pre"
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UnsupportedError, match="kind 'WordLevel'"):
        vocabulary(words, 10, "llama")
    with pytest.raises(UnsupportedError, match="no tokenizer.json form"):
        vocabulary(object(), 10, "llama")


def test_files_that_contradict_themselves(data: Path, tmp_path: Path) -> None:
    tokenizer, path = load(data, "gpt-2"), tmp_path / "a.gguf"
    for key, value, message in (
        ("bos_token_id", Value.of(Kind.UINT32, 9999), "bos_token_id is 9999, of 364 tokens"),
        ("token_type", Value.of(Kind.ARRAY, [1, 1], Kind.INT32), "token_type has 2 elements for 364"),
        ("merges", Value.of(Kind.ARRAY, ["zz qq"], Kind.STRING), "'zz qq', which joins no two tokens"),
        ("tokens", Value.of(Kind.STRING, "a"), "tokens must be an array"),
    ):
        with pytest.raises(CheckpointError, match=message):
            tokenizer_of(save(tokenizer, path, **{key: value}))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.ggml\.model is 'rwkv'"):
        tokenizer_of(save(tokenizer, path, model=Value.of(Kind.STRING, "rwkv")))
    write(path, {"general.architecture": Value.of(Kind.STRING, "llama")}, {})
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        tokenizer_of(GgufFile.open(path))
