"""From a transformers tokenizer to the ``tokenizer.*`` entries of a GGUF file.

Source: gguf-py's keys (``Keys.Tokenizer``), ``get_vocab_base``, ``_create_vocab_sentencepiece`` and ``SpecialVocab`` of
llama.cpp's converter. Where that needs a SentencePiece file for the scores, here they are made of the merges: llama.cpp
joins the pair whose token has the highest score, so the score is minus the rank of the merge.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qhub.errors import UnsupportedError
from qhub_gguf.container.values import Kind, Value
from qhub_gguf.metadata.keys import Entries
from qhub_gguf.metadata.splitting import name_of

__all__ = ["BYTE", "CONTROL", "NORMAL", "SPECIAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "vocabulary"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# llama.cpp's spelling of separator is part of the format.
SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
# Added tokens that are control tokens though their files do not say so (``does_token_look_special``).
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)


def vocabulary(
    tokenizer: Any, vocab_size: int, architecture: str, config: Any = None, pre: str | None = None
) -> dict[str, Value]:
    """Return the ``tokenizer.*`` entries.

    ``tokenizer``: a fast tokenizer of transformers. ``vocab_size``: rows of the embedding; missing tokens are filled
    with ``[PAD{i}]``. ``config``: of the model, for ids of special tokens that the tokenizer does not name. ``pre``:
    the name of the pre-tokenizer, if it cannot be found out. Raises :class:`UnsupportedError` for what llama.cpp cannot
    do.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"{type(tokenizer).__name__} has no tokenizer.json form, which writing GGUF needs; load it as a fast "
            "tokenizer"
        )
    stated = json.loads(backend.to_str())
    entries = Entries("tokenizer.ggml")
    model = stated["model"]
    tokens = _Tokens(stated, vocab_size)
    if model["type"] == "Unigram":
        _unigram(entries, stated, tokens)
    elif model["type"] == "BPE" and _byte_level(stated):
        entries.own("model", "gpt2")
        entries.own("pre", pre or name_of(stated["pre_tokenizer"], bool(model.get("ignore_merges"))))
        tokens.add(entries, scores=None)
        entries.own("merges", _merges(model), Kind.STRING)
    elif model["type"] == "BPE":
        _sentencepiece(entries, stated, tokens, architecture, pre)
    else:
        raise UnsupportedError(f"llama.cpp's files have no tokenizer of the kind {model['type']!r}")
    _special(entries, tokenizer, config, vocab_size)
    return entries.values


class _Tokens:
    """Holds the text and the type of every token."""

    def __init__(self, stated: Mapping[str, Any], vocab_size: int) -> None:
        model = stated["model"]
        if model["type"] == "Unigram":
            vocab = {token: number for number, (token, _) in enumerate(model["vocab"])}
        else:
            vocab = model["vocab"]
        self.texts = [f"[PAD{number}]" for number in range(vocab_size)]
        self.types = [UNUSED] * vocab_size
        byte_fallback = bool(model.get("byte_fallback"))
        unknown = model.get("unk_token") if model["type"] != "Unigram" else None
        last = max([*vocab.values(), *(added["id"] for added in stated["added_tokens"])], default=-1)
        if last >= vocab_size:
            raise UnsupportedError(f"the tokenizer has token {last}, and the embedding has {vocab_size} rows")
        for token, number in vocab.items():
            self.texts[number] = token
            is_byte = byte_fallback and _BYTE.fullmatch(token) is not None
            self.types[number] = BYTE if is_byte else UNKNOWN if token == unknown else NORMAL
        for added in stated["added_tokens"]:
            number, text = added["id"], added["content"]
            if self.types[number] in (BYTE, UNKNOWN):
                continue
            special = added["special"] or _LOOKS_SPECIAL.fullmatch(text) is not None
            # User-defined tokens are matched in the text as it is.
            self.texts[number] = text if special else text.replace("\u2581", " ")
            self.types[number] = CONTROL if special else USER_DEFINED
        self.ids = vocab

    def add(self, entries: Entries, scores: Sequence[float] | None) -> None:
        entries.own("tokens", self.texts, Kind.STRING)
        if scores is not None:
            entries.own("scores", scores, Kind.FLOAT32)
        entries.own("token_type", self.types, Kind.INT32)


def _byte_level(stated: Mapping[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([stated["pre_tokenizer"], stated["decoder"]])


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]  # type: ignore[misc]


def _merges(model: Mapping[str, Any]) -> list[str]:
    """Return the merges as "left right", a space in a token spelt like GPT-2 spells it."""
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _pairs(model)]


def _sentencepiece(
    entries: Entries, stated: Mapping[str, Any], tokens: _Tokens, architecture: str, pre: str | None
) -> None:
    """Add a vocabulary in SentencePiece's manner: spaces as U+2581, bytes as ``<0x0A>``."""
    model = stated["model"]
    if not model.get("byte_fallback"):
        raise UnsupportedError(
            "llama.cpp's files have BPE on bytes (GPT-2) and with byte tokens (SentencePiece); this one is neither"
        )
    if architecture == "gemma4":
        entries.own("model", "gemma4")
        tokens.add(entries, [0.0] * len(tokens.texts))
        entries.own("merges", _merges(model), Kind.STRING)
        entries.own("add_space_prefix", False)
        return
    entries.own("model", "llama")
    entries.own("pre", pre or "default")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(model)):
        ranks.setdefault(left + right, rank)
    # Letters come after all merges; control tokens and bytes are found otherwise.
    alone = -float(len(ranks) + 1)
    scores = [
        -float(ranks[text]) if text in ranks else alone if kind == NORMAL else 0.0
        for text, kind in zip(tokens.texts, tokens.types, strict=True)
    ]
    tokens.add(entries, scores)
    entries.own("add_space_prefix", _prefix(stated))


def _prefix(stated: Mapping[str, Any]) -> bool:
    """Return whether a space is put before the text."""
    text = json.dumps([stated["normalizer"], stated["pre_tokenizer"]], ensure_ascii=False)
    if '"Metaspace"' in text:
        return '"prepend_scheme": "never"' not in text
    return '"Prepend"' in text


def _unigram(entries: Entries, stated: Mapping[str, Any], tokens: _Tokens) -> None:
    """Add a unigram vocabulary (T5)."""
    model = stated["model"]
    scores = [score for _, score in model["vocab"]]
    scores += [-1000.0] * (len(tokens.texts) - len(scores))
    unknown = model.get("unk_id")
    if unknown is not None:
        tokens.types[unknown] = UNKNOWN
    entries.own("model", "t5")
    entries.own("pre", "default")
    tokens.add(entries, scores)
    entries.own("add_space_prefix", _prefix(stated))
    normalizer = json.dumps(stated["normalizer"])
    entries.own("remove_extra_whitespaces", " {2,}" in normalizer or '"Strip"' in normalizer)
    for step in _normalizers(stated["normalizer"]):
        if step["type"] == "Precompiled":
            entries.own("precompiled_charsmap", list(base64.b64decode(step["precompiled_charsmap"])), Kind.UINT8)


def _normalizers(normalizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [step for inner in normalizer["normalizers"] for step in _normalizers(inner)]
    return [normalizer]


def _special(entries: Entries, tokenizer: Any, config: Any, vocab_size: int) -> None:
    """Add ids of special tokens, whether they are put around a text, and the chat template."""
    ids: dict[str, int] = {}
    for short, name in SPECIAL.items():
        number = getattr(tokenizer, f"{short}_token_id", None)
        if number is None:
            number = getattr(config, f"{short}_token_id", None)
        if isinstance(number, list):
            number = number[0] if number else None
        if isinstance(number, int) and 0 <= number < vocab_size:
            ids[short] = number
            entries.own(f"{name}_token_id", number)
    # What the tokenizer does, not what its files say it should.
    around = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    extra = len(around) > len(plain)
    entries.own("add_bos_token", extra and "bos" in ids and around[0] == ids["bos"])
    entries.own("add_eos_token", extra and "eos" in ids and around[-1] == ids["eos"])
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        for name, text in template.items():
            entries.set("tokenizer.chat_template" + ("" if name == "default" else f".{name}"), text)
        others = sorted(set(template) - {"default"})
        entries.set("tokenizer.chat_templates", others or None, Kind.STRING)
    else:
        entries.set("tokenizer.chat_template", template)
