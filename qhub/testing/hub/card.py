"""Reads a model card's YAML front matter: its data, the tags the Hub derives from it, and its mistakes."""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["card_data", "card_problems", "card_tags"]

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LIST_KEYS = ("tags", "datasets")
_TEXT_KEYS = ("library_name", "pipeline_tag", "license", "base_model_relation")
_MODEL_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


def card_data(text: str) -> dict[str, Any]:
    """Return the front matter of a card; an empty dict when there is none or it is not valid YAML."""
    data, _ = _parse(text)
    return data


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """Check a card as the Hub's ``/api/validate-yaml`` does, and return its errors and its warnings.

    The Hub knows more rules (lists of licences and languages); these are those a generated card breaks.
    """
    data, error = _parse(text)
    if error is not None:
        return [error], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    lists = [key for key in _LIST_KEYS if not all(isinstance(i, str) for i in _as_list(data.get(key)))]
    texts = [key for key in _TEXT_KEYS if not isinstance(data.get(key, ""), str)]
    models = [name for name in _as_list(data.get("base_model")) if not _MODEL_ID.fullmatch(str(name))]
    errors = [
        *(f'"{key}" must be a list of strings' for key in lists),
        *(f'"{key}" must be a string' for key in texts),
        *(
            f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
            for name in models
        ),
    ]
    return errors, []


def card_tags(data: dict[str, Any]) -> list[str]:
    """List the tags that the Hub shows for a card's data, in the order they are found and without repeats.

    Only the card is read: the Hub also adds tags for the files it sees, such as ``safetensors``.
    """
    tags = [str(data[key]) for key in ("library_name", "pipeline_tag") if data.get(key)]
    tags += map(str, _as_list(data.get("tags")) + _as_list(data.get("language")))
    tags += [f"dataset:{name}" for name in _as_list(data.get("datasets"))]
    tags += [f"base_model:{name}" for name in _as_list(data.get("base_model"))]
    if relation := data.get("base_model_relation"):
        tags += [f"base_model:{relation}:{name}" for name in _as_list(data.get("base_model"))]
    tags += [f"license:{name}" for name in _as_list(data.get("license"))]
    return list(dict.fromkeys(tags))


def _parse(text: str) -> tuple[dict[str, Any], str | None]:
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}, None
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return {}, f"Invalid YAML in the front matter: {error}"
    if data is None:
        return {}, None
    if not isinstance(data, dict):
        return {}, f"The front matter must be a mapping, but it is a {type(data).__name__}"
    return data, None


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
