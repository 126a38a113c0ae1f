"""What the model card of a quantized model says, read without any Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard

from qhub import QuantizedTensor
from qhub.errors import CheckpointError
from qhub.integrations.model_card import card_tags, card_text, is_untouched, with_tags, write_card
from qhub.layouts import Affine, Codebook, Float8, Grid, Nested

NESTED: dict[str, Any] = {"scales_nested": Nested(), "zeros_nested": Nested()}
BLOCKS: dict[str, Any] = {
    "out_features": 64,
    "in_features": 64,
    "out_group": 1,
    "in_group": 8,
    "grid": Grid.along_k(64),
}


@pytest.fixture(scope="module")
def quantized(tiny: Callable[[str], Path], pow2: str) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config={"quant_method": pow2})


@pytest.fixture
def model(quantized: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A quantized model whose quantizer's facts, and the name it was loaded from, a test may change."""
    quantizer = quantized.hf_quantizer
    facts = {"method": quantizer.method, "plan": dict(quantizer.plan), "replaces": False, "pre_quantized": False}
    monkeypatch.setattr(quantized, "hf_quantizer", SimpleNamespace(**facts))
    monkeypatch.setattr(quantized.config, "_name_or_path", "acme/base")
    return quantized


def header(text: str) -> dict[str, Any]:
    return ModelCard(text).data.to_dict()


def test_header_and_table(model: Any) -> None:
    text = card_text(model, "me/mine", tags=["extra", "qhub"])
    assert header(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "acme/base",
        "base_model_relation": "quantized",
        "tags": ["qhub", "pow2", "quantized", "4-bit", "extra"],
    }
    weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    count = sum(w.numel() for w in weights)
    # 4-bit codes, a float32 scale for 32 of them, and a table of 16 float32 in each tensor.
    bits = 4 + 1 + len(weights) * 16 * 32 / count
    dense = sum(p.numel() * 4 for p in model.parameters() if not isinstance(p, QuantizedTensor))
    assert f"| bits per quantized weight | {bits:.3f}, scales and zeros counted |" in text
    assert f"| quantized weights | {count:,} in {len(weights)} tensors |" in text
    assert f"| size of all parameters | {round(bits * count / 8) + dense:,} bytes |" in text
    assert "| other weights | float32 |" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in text
    assert "without qhub" not in text, "transformers does not know pow2"


def test_a_method_that_transformers_knows(model: Any) -> None:
    model.hf_quantizer.replaces = True
    assert "the field's format for pow2" in card_text(model)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("gpt2", "gpt2"),
        ("acme/base-1.5_x", "acme/base-1.5_x"),
        ("", None),
        ("/data/model", None),
        ("./model", None),
        ("../model", None),
        ("~/model", None),
        ("a/b/c", None),
        ("acme/two words", None),
        ("acme/x\nlicense: mit", None),
        ("here", None),
        ("here/model", None),
        ("me/mine", None),
        ("x" * 300, None),
    ],
)
def test_base_model_is_a_name_on_the_hub(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, base: str | None
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model.config._name_or_path = name
    text = card_text(model, "me/mine")
    data = header(text)
    assert data.get("base_model") == base
    assert data.get("base_model_relation") == ("quantized" if base else None)
    assert ("| base model |" in text) == (base is not None)


def test_a_model_that_was_loaded_quantized_derives_in_a_way_that_is_not_known(model: Any) -> None:
    model.hf_quantizer.pre_quantized = True
    data = header(card_text(model))
    assert data["base_model"] == "acme/base"
    assert "base_model_relation" not in data


def test_base_model_comes_from_the_card_beside_the_model(model: Any, tmp_path: Path) -> None:
    write_card(model, tmp_path)
    first = (tmp_path / "README.md").read_text()
    model.config._name_or_path = str(tmp_path)
    assert card_text(model) == first
    assert header(first)["base_model"] == "acme/base"
    (tmp_path / "README.md").write_text("---\nbase_model: [a/b, c/d]\nbase_model_relation: merge\n---\n")
    text = card_text(model)
    assert header(text)["base_model"] == ["a/b", "c/d"]
    assert header(text)["base_model_relation"] == "merge"
    assert "[c/d](https://huggingface.co/c/d)" in text


def test_a_broken_card_beside_the_model_is_reported(model: Any, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [a\n---\n")
    model.config._name_or_path = str(tmp_path)
    assert "base_model" not in header(card_text(model))
    assert f"the header of {tmp_path / 'README.md'} is not valid" in caplog.text


@pytest.mark.parametrize(
    ("class_name", "config_name", "auto", "task"),
    [
        ("LlamaForCausalLM", "LlamaConfig", "AutoModelForCausalLM", "text-generation"),
        ("LlamaModel", "LlamaConfig", "AutoModel", None),
        ("LlamaForSequenceClassification", "LlamaConfig", "AutoModelForSequenceClassification", "text-classification"),
        ("GPT2LMHeadModel", "GPT2Config", "AutoModelForCausalLM", "text-generation"),
        ("BertForMaskedLM", "BertConfig", "AutoModelForMaskedLM", "fill-mask"),
        ("BertForPreTraining", "BertConfig", "AutoModelForPreTraining", None),
        ("T5ForConditionalGeneration", "T5Config", "AutoModelForSeq2SeqLM", "text2text-generation"),
        (
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            "AutoModelForSpeechSeq2Seq",
            "automatic-speech-recognition",
        ),
        ("LlavaForConditionalGeneration", "LlavaConfig", "AutoModelForImageTextToText", "image-text-to-text"),
        ("Gemma3ForConditionalGeneration", "Gemma3Config", "AutoModelForImageTextToText", "image-text-to-text"),
        ("ViTForImageClassification", "ViTConfig", "AutoModelForImageClassification", "image-classification"),
        ("CLIPTextModelWithProjection", "CLIPTextConfig", "CLIPTextModelWithProjection", None),
    ],
)
def test_the_class_that_loads_it(pow2: str, class_name: str, config_name: str, auto: str, task: str | None) -> None:
    # Nothing but the class and its config matters here, so the model has one weight.
    made = object.__new__(getattr(tf, class_name))
    torch.nn.Module.__init__(made)
    made.config = getattr(tf, config_name)()
    made.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    made.__dict__["hf_quantizer"] = SimpleNamespace(method=pow2, plan={}, replaces=False, pre_quantized=False)
    text = card_text(made, "me/mine")
    assert f'{auto}.from_pretrained("me/mine")' in text
    assert f"from transformers import {auto}\n" in text
    assert header(text).get("pipeline_tag") == task


@pytest.mark.parametrize(
    ("layout", "tag"),
    [
        # Scales are no part of it, whatever they are stored in: 5 and more bits a weight in all.
        (Affine(out_features=64, in_features=64, bits=3, grid=Grid.along_k(16), zero="constant"), "3-bit"),
        (Affine(out_features=64, in_features=64, bits=4, grid=Grid.along_k(16), zero="value", **NESTED), "4-bit"),
        (Affine(out_features=64, in_features=64, bits=8, signed=True, grid=Grid.along_k(64)), "8-bit"),
        (Float8(out_features=64, in_features=64, grid=Grid.along_k(16)), "8-bit"),
        # 8 + 8 bits for 8 weights, or 8 and a sign for each of them; the codebooks are larger than the codes.
        (Codebook(nbits=(8, 8), **BLOCKS), "2-bit"),
        (Codebook(nbits=(8,), signs=True, **BLOCKS), "2-bit"),
    ],
)
def test_the_tag_counts_the_bits_of_a_code(layout: Any, tag: str) -> None:
    parts = {name: torch.zeros(spec.shape, dtype=spec.dtypes[0]) for name, spec in layout.part_specs().items()}
    weight = QuantizedTensor.build(layout, parts, torch.float32)
    model = torch.nn.Module()
    model.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    model.hf_quantizer = SimpleNamespace(method="m")
    assert card_tags(model) == ["qhub", "m", "quantized", tag]


def test_a_card_that_is_changed_anywhere_is_no_longer_qhubs(model: Any) -> None:
    text = card_text(model)
    assert is_untouched(text)
    for place in range(0, len(text), 7):
        assert not is_untouched(text[:place] + "~" + text[place + 1 :]), text[place:]
    assert not is_untouched(text + "More.\n")
    assert not is_untouched("\n" + text)
    assert not is_untouched("")


def test_tags_of_the_replaced_card_go_over_but_for_those_of_its_numbers(model: Any) -> None:
    previous = "---\ntags: [qhub, pow2, quantized, 9-bit, mine, 4-bits-are-enough]\nbase_model: a/b\n---\n"
    tags = header(card_text(model, previous=previous, tags=["new"]))["tags"]
    assert tags == ["qhub", "pow2", "quantized", "4-bit", "mine", "4-bits-are-enough", "new"]
    model.config._name_or_path = ""
    assert header(card_text(model, previous=previous))["base_model"] == "a/b"


def test_a_folders_own_card_is_kept_and_qhubs_is_renewed(model: Any, tmp_path: Path) -> None:
    old = tmp_path / "old.md"
    write_card(model, tmp_path)
    old.write_bytes((tmp_path / "README.md").read_bytes())
    model.hf_quantizer.plan.popitem()
    write_card(model, tmp_path, previous=old)
    count = len(model.hf_quantizer.plan)
    assert f"in {count} tensors" in (tmp_path / "README.md").read_text()
    old.write_bytes(old.read_bytes() + b"\xff mine")
    write_card(model, tmp_path, previous=old)
    assert (tmp_path / "README.md").read_bytes() == old.read_bytes()


@pytest.mark.parametrize(
    ("card", "tags"),
    [
        ("no header", ["a", "b"]),
        ("---\nlicense: mit\n---\nbody", ["a", "b"]),
        ("---\ntags: c\n---\nbody", ["c", "a", "b"]),
        ("---\ntags: [b, c]\n---\nbody", ["b", "c", "a"]),
        ("---\r\ntags: [c]\r\n---\r\nbody\r\n", ["c", "a", "b"]),
    ],
)
def test_tags_are_added_once(card: str, tags: list[str]) -> None:
    tagged = with_tags(card, ["a", "b", "a"], "it")
    assert ModelCard(tagged).data.tags == tags
    assert ModelCard(tagged).text == ModelCard(card).text
    assert with_tags(tagged, ["a", "b"], "it") == tagged


@pytest.mark.parametrize("header", ["tags: [a", "- a", "1: {2: 3}\nmodel-index: 3"])
def test_a_header_that_cannot_be_read_is_one_error(header: str) -> None:
    with pytest.raises(CheckpointError, match="the header of that card is not valid"):
        with_tags(f"---\n{header}\n---\n", ["a"], "that card")
