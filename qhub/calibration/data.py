"""Calibration samples: from strings, chats, tokens, text and jsonl files, or datasets by name.

A sample is a dictionary of keyword arguments for the model, batch dimension first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhub.errors import ConfigError

__all__ = ["check_samples", "samples_of", "windows"]

logger = logging.getLogger("qhub")

# What GPTQConfig calls them: (path, config, data files, split, column).
_DATASETS: Mapping[str, tuple[str, str | None, dict[str, str] | None, str, str]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train", "text"),
    "c4": ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}, "train", "text"),
    "c4-new": ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}, "train", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", None, "train", "sentence"),
}
# Fewer tokens than this say little about a layer of usual width.
_FEW_TOKENS = 8192


def samples_of(data: Any, tokenizer: Any, samples: int, length: int) -> list[dict[str, Any]]:
    """Return at most ``samples`` samples of at most ``length`` tokens.

    ``data``: a text file (windows of ``length`` tokens, evenly spaced over it, without special tokens); a jsonl file
    (one sample a line: a string, ``{"text": ...}`` or ``{"messages": [...]}``); a name that GPTQConfig knows
    (``"wikitext2"``, ``"c4"``, ``"c4-new"``, ``"ptb"``) or any of the ``datasets`` library (``"name"`` or
    ``"name:config"``, its split "train" and column "text"); or a sequence of strings, chats (lists of messages, brought
    into the tokenizer's chat template), token ids, or ready dictionaries. ``tokenizer``: may be None where nothing is
    text. Raises :class:`ConfigError` when nothing is left, or what was given is none of these.
    """
    if isinstance(data, str | Path):
        file = Path(data)
        if not file.is_file():
            return _tokenized_texts(_dataset(str(data), samples, length), tokenizer, samples, length)
        if file.suffix not in (".jsonl", ".json"):
            return _spread(file.read_text(encoding="utf-8"), tokenizer, samples, length, str(file))
        data = _lines(file)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ConfigError(
            f"calibration data of type {type(data).__name__}: expected strings, chats, token ids, a text or jsonl "
            "file, or the name of a dataset"
        )
    result = [_sample(one, tokenizer, length, number) for number, one in zip(range(samples), data, strict=False)]
    result = [one for one in result if one is not None]
    if not result:
        raise ConfigError("the calibration data hold no tokens: give at least one text that is not empty")
    return result  # type: ignore[return-value]


def windows(ids: Sequence[int] | Tensor, count: int, length: int) -> list[Tensor]:
    """Return at most ``count`` windows (1, length) of ``ids``, evenly spaced from the first token to the last.

    Window i starts at token i * floor((n - length) / (count - 1)).
    """
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    last = len(tokens) - length
    if last < 0:
        return [tokens[None]] if len(tokens) else []
    step = last // max(count - 1, 1)
    starts = dict.fromkeys(min(i * step, last) for i in range(count))
    return [tokens[None, start : start + length] for start in starts]


def check_samples(samples: Sequence[Mapping[str, Any]], vocabulary: int | None, context: int | None) -> list[str]:
    """Return warnings about the samples.

    Raises :class:`ConfigError` for a token that the model does not know, or a sample longer than its context.
    """
    tokens = 0
    for number, sample in enumerate(samples):
        ids = sample.get("input_ids")
        if not isinstance(ids, Tensor):
            continue
        tokens += ids.numel()
        if ids.numel() and vocabulary is not None and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
            raise ConfigError(
                f"calibration sample {number} has token {int(ids.max())}, the model knows {vocabulary}: the tokenizer "
                "is another model's"
            )
        if context is not None and ids.shape[-1] > context:
            raise ConfigError(
                f"calibration sample {number} has {ids.shape[-1]} tokens, the model's context is {context}: cut it, or "
                "give text, which is cut by itself"
            )
    if any("input_ids" in sample for sample in samples) and tokens < _FEW_TOKENS:
        return [
            f"only {tokens} calibration tokens in {len(samples)} samples: {_FEW_TOKENS} or more give better results"
        ]
    return []


def _sample(one: Any, tokenizer: Any, length: int, number: int) -> dict[str, Any] | None:
    if isinstance(one, Mapping) and "input_ids" not in one and not any(isinstance(v, Tensor) for v in one.values()):
        found = next((one[name] for name in ("messages", "text", "content") if name in one), None)
        if found is None:
            raise ConfigError(
                f"calibration sample {number} has the keys {sorted(one)}: expected 'text', 'messages' or 'input_ids'"
            )
        one = found
    if isinstance(one, str):
        if not one.strip():
            return None
        return {"input_ids": _tokens(tokenizer, one)[:, :length]}
    if isinstance(one, Sequence) and one and isinstance(one[0], Mapping):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"calibration sample {number} is a chat, and the tokenizer has no chat template: give text instead"
            )
        ids = tokenizer.apply_chat_template(one, tokenize=True, return_dict=False)
        return {"input_ids": torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)[:, :length]}
    if isinstance(one, Mapping):
        ready = {name: _tensor(value) for name, value in one.items() if name != "labels"}
        if ready.get("attention_mask") is not None and bool((ready["attention_mask"] == 1).all()):
            del ready["attention_mask"]
        ids = ready.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 1:
            ready["input_ids"] = ids[None]
        return ready if not isinstance(ids, Tensor) or ids.numel() else None
    ids = _tensor(one)
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise ConfigError(
            f"calibration sample {number} is {type(one).__name__}: expected a string, a chat, token ids or a dictionary"
        )
    return {"input_ids": ids.reshape(1, -1).to(torch.int64)} if ids.numel() else None


def _tensor(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return value
    return value


def _tokens(tokenizer: Any, text: str) -> Tensor:
    if tokenizer is None:
        raise ConfigError("calibration texts need a tokenizer: none lies beside the model, so name one, or give tokens")
    return torch.tensor([tokenizer(text, verbose=False)["input_ids"]], dtype=torch.int64)


def _spread(text: str, tokenizer: Any, samples: int, length: int, source: str) -> list[dict[str, Any]]:
    if tokenizer is None:
        raise ConfigError(f"{source} is text and needs a tokenizer: none lies beside the model, so name one")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = windows(ids, samples, length)
    if not found:
        raise ConfigError(f"{source} holds no tokens: the calibration needs text")
    return [{"input_ids": window} for window in found]


def _lines(file: Path) -> list[Any]:
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{file}, line {number}: not JSON ({error}); a jsonl file has one value a line"
            ) from error
    return lines


def _dataset(name: str, samples: int, length: int) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{name!r} is no file, so it would be a dataset of the Hub, and that needs the package datasets: pip "
            "install datasets, or name a text or jsonl file"
        ) from error
    path, _, config = name.partition(":")
    known = _DATASETS.get(name, (path, config or None, None, "train", "text"))
    try:
        rows = datasets.load_dataset(known[0], known[1], data_files=known[2], split=known[3], streaming=True)
        texts, characters = [], 0
        for row in rows:
            texts.append(str(row[known[4]]))
            characters += len(texts[-1])
            # Eight characters a token is more than any tokenizer needs for prose.
            if characters > 8 * samples * length:
                break
    except Exception as error:
        raise ConfigError(
            f"{name!r} is no file, and the datasets library cannot read a dataset of that name "
            f"({type(error).__name__}: {error}): check the name and the connection, or name a text or jsonl file"
        ) from error
    return texts


def _tokenized_texts(texts: Sequence[str], tokenizer: Any, samples: int, length: int) -> list[dict[str, Any]]:
    return _spread("\n\n".join(texts), tokenizer, samples, length, "the dataset")
