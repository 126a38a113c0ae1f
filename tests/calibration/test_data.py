"""Calibration data of every kind become samples, and what is no data is refused with a word on what to give."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from qhub.calibration.data import check_samples, samples_of, windows
from qhub.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer(doclm):
    return AutoTokenizer.from_pretrained(doclm)


def test_windows_are_evenly_spaced():
    found = windows(list(range(1000)), 5, 100)
    assert [int(w[0, 0]) for w in found] == [0, 225, 450, 675, 900]
    assert all(tuple(w.shape) == (1, 100) for w in found)
    # Fewer distinct places than windows: each is taken once.
    assert [int(w[0, 0]) for w in windows(list(range(102)), 8, 100)] == [0]
    assert windows([1, 2, 3], 4, 10)[0].tolist() == [[1, 2, 3]]


def test_a_text_file(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    found = samples_of(str(file), tokenizer, 4, 64)
    ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    assert len(found) == 4
    assert found[0]["input_ids"][0].tolist() == ids[:64]
    last = 3 * ((len(ids) - 64) // 3)
    assert found[-1]["input_ids"][0].tolist() == ids[last : last + 64]


def test_a_jsonl_file(tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    lines = ["a plain string", {"text": "a text"}, {"text": "another", "source": "x"}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = samples_of(file, tokenizer, 10, 64)
    assert [s["input_ids"][0].tolist() for s in found] == [
        tokenizer(text)["input_ids"] for text in ("a plain string", "a text", "another")
    ]
    file.write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(ConfigError, match=r"line 2: not JSON"):
        samples_of(file, tokenizer, 10, 64)
    file.write_text('{"words": "good"}\n')
    with pytest.raises(ConfigError, match=r"'words'.*expected 'text'"):
        samples_of(file, tokenizer, 10, 64)


def test_chats_go_through_the_template(tokenizer):
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    with pytest.raises(ConfigError, match="no chat template"):
        samples_of([chat], tokenizer, 4, 64)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = template
    try:
        found = samples_of([chat, {"messages": chat}], tokenizer, 4, 64)
    finally:
        tokenizer.chat_template = None
    wanted = tokenizer("<user>Hello<assistant>Hi", add_special_tokens=False)["input_ids"]
    assert [s["input_ids"][0].tolist() for s in found] == [wanted, wanted]


def test_tokens_and_dictionaries():
    found = samples_of(
        [[1, 2, 3], torch.tensor([[4, 5]]), {"input_ids": [6, 7], "attention_mask": [1, 1]}], None, 9, 64
    )
    assert [s["input_ids"].tolist() for s in found] == [[[1, 2, 3]], [[4, 5]], [[6, 7]]]
    assert all(set(s) == {"input_ids"} for s in found)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no tokens"),
        (["", "  "], "no tokens"),
        (7, "expected strings"),
        ([3.5], "sample 0 is float"),
        (["text"], "need a tokenizer"),
    ],
)
def test_what_is_no_data(data, message):
    with pytest.raises(ConfigError, match=message):
        samples_of(data, None, 4, 64)


def test_a_name_that_is_nothing(tokenizer, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        samples_of("c4", tokenizer, 4, 64)


def test_a_dataset_by_name(tokenizer, monkeypatch):
    import sys
    import types

    asked = []

    def load_dataset(path, name, data_files, split, streaming):
        asked.append((path, name, split))
        return [{"text": f"This is row {i} of the dataset."} for i in range(500)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = samples_of("wikitext2", tokenizer, 3, 32)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train")]
    assert [tuple(s["input_ids"].shape) for s in found] == [(1, 32)] * 3


def test_samples_that_do_not_fit_the_model():
    ids = torch.arange(20)[None]
    with pytest.raises(ConfigError, match=r"token 19, the model knows 19"):
        check_samples([{"input_ids": ids}], 19, None)
    with pytest.raises(ConfigError, match=r"sample 1 has 20 tokens, the model's context is 16"):
        check_samples([{"input_ids": ids[:, :4]}, {"input_ids": ids}], 100, 16)
    assert "only 20 calibration tokens" in check_samples([{"input_ids": ids}], 100, None)[0]
    assert check_samples([{"input_ids": torch.ones(1, 9000, dtype=torch.int64)}], 100, None) == []
