"""Names of the files of a split GGUF model: ``model-00002-of-00005.gguf`` (llama_split_path of llama.cpp)."""

from __future__ import annotations

import re
from pathlib import Path

from qhub.errors import CheckpointError

__all__ = ["SPLIT_COUNT", "SPLIT_NUMBER", "SPLIT_TENSORS", "part_path", "part_paths", "without_part"]

SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def part_path(path: Path, number: int, count: int) -> Path:
    """Return the path of part ``number`` (from 0) of the ``count`` files that ``path`` is split into."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{number + 1:05d}-of-{count:05d}.gguf")


def without_part(path: Path) -> Path:
    """Return ``model.gguf`` for ``model-00002-of-00005.gguf``, and any other path as it is."""
    match = _PART.fullmatch(path.name)
    return path.with_name(f"{match['stem']}.gguf") if match else path


def part_paths(path: Path, count: int) -> list[Path]:
    """Return the paths of all files of the model that ``path`` is one part of; :class:`CheckpointError` where its name
    does not tell or one of them is missing."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path} says that it is one of {count} files; then it must be named like model-00001-of-{count:05d}.gguf"
        )
    paths = [part_path(without_part(path), number, count) for number in range(count)]
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        raise CheckpointError(f"{path} is one of {count} files of a model, and beside it {missing[:5]} are missing")
    return paths
