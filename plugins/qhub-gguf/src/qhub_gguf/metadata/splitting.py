"""How text is cut before byte-pair merges: llama.cpp's names for it, and the regular expressions of ``tokenizer.json``.

A GGUF file has the name only (``tokenizer.ggml.pre``). convert_hf_to_gguf finds it by a hash of the tokens of a test
text, so it knows the vocabularies that it has seen; here the expressions themselves are compared, so that any
vocabulary is understood. Source of names and expressions: ``llm_tokenizer_bpe`` of llama-vocab.cpp, whose comments
quote the original ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub.errors import UnsupportedError

__all__ = ["IGNORE_MERGES", "name_of", "pre_tokenizer_of"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"

_LLAMA3 = _CONTRACTIONS + "|" + _LETTERS + r"|\p{N}{1,3}|" + _REST
_QWEN2 = _CONTRACTIONS + "|" + _LETTERS + r"|\p{N}|" + _REST
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|" + r"\p{N}|" + _REST_SLASH
_GPT4O = (
    f"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
    + r"\p{N}{1,3}|"
    + _REST_SLASH
)
_BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
# GPT-2's own, which the ByteLevel pre-tokenizer has built in, in the form that some files spell out.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Name for writing -> expression; the first name of an expression is the one that is written.
_BY_EXPRESSION = {
    _LLAMA3: "smaug-bpe",
    _QWEN2: "qwen2",
    _QWEN35: "qwen35",
    _TEKKEN: "tekken",
    _GPT4O: "gpt-4o",
    _BLOOM: "bloom",
    _GPT2: "gpt-2",
}

# These take a token that is in the vocabulary whole, whatever the merges say (``ignore_merges`` of tokenizer.json).
IGNORE_MERGES = frozenset(
    ["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken"]
)

_NAMES: dict[str, tuple[str, ...]] = {
    _LLAMA3: (*sorted(IGNORE_MERGES - {"tekken"}), "dbrx", "smaug-bpe", "chatglm-bpe", "glm4"),
    _QWEN2: ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    _QWEN35: ("qwen35",),
    _TEKKEN: ("tekken",),
    _GPT4O: ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    _BLOOM: ("bloom", "poro-chat", "gpt3-finnish"),
}
_EXPRESSIONS = {name: expression for expression, names in _NAMES.items() for name in names}

# Digits one by one, then as GPT-2 does.
_DIGITS = frozenset(
    ["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2", "viking"]
)


def name_of(pre_tokenizer: Mapping[str, Any] | None, ignore_merges: bool) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a ``tokenizer.json``; :class:`UnsupportedError` for one that
    llama.cpp cannot be told."""
    steps = _steps(pre_tokenizer)
    if not steps:
        raise UnsupportedError("llama.cpp has no byte-level tokenizer that does not cut text before merging")
    kinds = [step["type"] for step in steps]
    regex_in_bytes = any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps)
    expressions = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if kinds == ["ByteLevel"] and regex_in_bytes:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not regex_in_bytes and expressions[0] in _BY_EXPRESSION:
        return "llama-bpe" if expressions[0] == _LLAMA3 and ignore_merges else _BY_EXPRESSION[expressions[0]]
    if kinds == ["Digits", "ByteLevel"] and regex_in_bytes and steps[0].get("individual_digits"):
        return "starcoder"
    if kinds[:2] == ["Punctuation", "ByteLevel"] and expressions == ["[0-9][0-9][0-9]"]:
        return "falcon"
    raise UnsupportedError(
        f"llama.cpp has no name that qhub knows for the pre-tokenizer {kinds} with the expressions {expressions}; give "
        "the name (tokenizer.ggml.pre) yourself if llama.cpp has one"
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner)]
    return [pre_tokenizer]


def pre_tokenizer_of(name: str | None) -> Any:
    """Return the ``tokenizers`` pre-tokenizer that llama.cpp's ``name`` stands for; names that are not known here, and
    none, stand for GPT-2's (llama.cpp: its own default, which is close to it)."""
    from tokenizers import Regex, pre_tokenizers

    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _EXPRESSIONS:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_EXPRESSIONS[name]), "isolated"), last])
    if name in _DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    if name == "falcon":
        thousands = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
        return pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), whole, thousands])
    return whole
