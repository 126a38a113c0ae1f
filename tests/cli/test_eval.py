"""``qhub eval``: the figures of the library, in a table and as JSON, and what cannot be measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qhub.evaluate import compare, windows_of

TEXTS = Path(__file__).resolve().parents[2] / "examples" / "text"
SHORT = ["--windows", "3", "--length", "64"]


@pytest.fixture(scope="module")
def expected(quantized, doclm):
    model, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (quantized, doclm))
    tokenizer = AutoTokenizer.from_pretrained(doclm)
    text = (TEXTS / "eval_mix.txt").read_text(encoding="utf-8")
    return compare(model, base, windows_of(tokenizer, text, count=3, length=64))


def test_figures_are_those_of_the_library(as_json, quantized, doclm, expected):
    arguments = ["eval", quantized, "--base", doclm, *SHORT]
    texts = ["--text", TEXTS / "eval_mix.txt", "--text", TEXTS / "eval_handbook.txt"]
    data = as_json(*arguments, *texts, "--no-speed")
    row, other = data["texts"]
    assert (row["text"], other["text"], row["windows"]) == ("eval_mix.txt", "eval_handbook.txt", 3)
    assert row["perplexity"] == pytest.approx(expected.model.value, rel=1e-5)
    assert row["base_perplexity"] == pytest.approx(expected.base.value, rel=1e-5)
    assert row["standard_error"] == pytest.approx(expected.model.standard_error, rel=1e-3)
    assert row["kl_mean"] == pytest.approx(expected.kl_mean, rel=1e-3) and row["kl_mean"] > 0.01
    assert row["kl_p99"] == pytest.approx(expected.kl_p99, rel=1e-3)
    assert row["top1_agreement"] == pytest.approx(expected.top1_agreement)
    assert row["perplexity"] != other["perplexity"] and data["decode"] is None
    assert data["protocol"] == {
        "windows": 3,
        "length": 64,
        "characters": 150_000,
        "dtype": "float32",
        "weights_only": False,
    }


def test_weights_only_measures_the_dequantized_weights(as_json, quantized, doclm, expected, monkeypatch):
    # With a kernel forced that does not exist, any product with a quantized weight fails.
    monkeypatch.setenv("QHUB_KERNEL", "none-such")
    arguments = ["eval", quantized, *SHORT, "--text", TEXTS / "eval_mix.txt", "--no-speed"]
    (row,) = as_json(*arguments, "--weights-only")["texts"]
    assert row["perplexity"] == pytest.approx(expected.model.value, rel=1e-4)
    assert "base_perplexity" not in row
    as_json(*arguments, code=1)


def test_table_speed_and_default_text(run, doclm):
    result = run("eval", doclm, *SHORT)
    assert result.exit_code == 0
    assert "Python's manual" in result.stdout and "±" in result.stdout
    assert "tokens/s (greedy, batch 1, median of 3)" in result.stdout
    assert "KL" not in result.stdout and "measuring on" in result.stderr


def test_speed_in_json(as_json, doclm):
    decode = as_json("eval", doclm, *SHORT)["decode"]
    assert decode["new_tokens"] == 64 and len(decode["seconds"]) == 3
    assert decode["tokens_per_second"] == pytest.approx(64 / sorted(decode["seconds"])[1])


def test_tokenizer_comes_from_the_base_or_by_name(run, as_json, quantized, doclm, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((quantized / name).read_bytes())
    arguments = ["eval", tmp_path, *SHORT, "--no-speed"]
    result = run(*arguments)
    assert result.exit_code == 1 and "has no tokenizer files" in result.stderr and "--tokenizer" in result.stderr
    with_base = as_json(*arguments, "--base", doclm)["texts"][0]["perplexity"]
    by_name = as_json(*arguments, "--tokenizer", doclm)["texts"][0]["perplexity"]
    assert with_base == pytest.approx(by_name)


def test_short_text_is_noticed(run, as_json, doclm, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text((TEXTS / "eval_mix.txt").read_text(encoding="utf-8")[:1000])
    result = run("eval", doclm, "--text", text, "--length", "64", "--no-speed")
    assert result.exit_code == 0
    assert "warning: short.txt fills only" in result.stderr
    text.write_text("too short")
    result = run("eval", doclm, "--text", text, "--no-speed")
    assert result.exit_code == 1 and "less than one window of 512" in result.stderr


def test_impossible_requests(run, said, doclm, tiny, tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    result = run("eval", doclm, "--text", tmp_path / "latin.txt")
    assert result.exit_code == 2 and "is not UTF-8" in said(result)
    assert run("eval", doclm, "--text", tmp_path / "nowhere.txt").exit_code == 2
    result = run("eval", tiny("llama"), "--tokenizer", doclm, *SHORT, "--no-speed")
    assert result.exit_code == 1 and "the tokenizer is another model's" in result.stderr


def test_a_broken_model_is_1(as_json, doclm, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(doclm)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    model.save_pretrained(tmp_path)
    data = as_json("eval", tmp_path, "--tokenizer", doclm, *SHORT, "--no-speed", code=1)
    assert data["texts"][0]["perplexity"] is None
