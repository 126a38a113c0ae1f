"""Folders with a model: their weight files, and what stands beside the weights."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["COMPANIONS", "copy_companions", "local_folder", "model_class", "weight_files"]

# What makes a folder usable besides weights and config.json: tokenizer, processors, chat templates. The model writes
# its own generation_config.json.
COMPANIONS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
)


def local_folder(model: str, weights: bool = False) -> Path:
    """Return the folder of ``model``; for one on the Hub the cache's, into which its small files are downloaded.

    ``weights``: configs and safetensors files too.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted = [*COMPANIONS, "*.safetensors.index.json"]
    if weights:
        wanted += ["config.json", "generation_config.json", "*.safetensors"]
    return Path(snapshot_download(model, allow_patterns=wanted))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the model in ``folder``: those that an index or config.json names, if one does."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names if (folder / name).is_file()]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    return _container_files(folder) or sorted(folder.glob("*.safetensors"))


def _container_files(folder: Path) -> list[Path]:
    """Return the file that config.json names instead of safetensors, with the others that it is split into."""
    from qhub.integrations.transformers.containers import file_named_by

    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    name = file_named_by(values.get("quantization_config"))
    if name is None or not (folder / name).is_file():
        return []
    split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\.\w+)", name)
    if split is None:
        return [folder / name]
    return sorted(folder.glob(f"{split[1]}-*-of-{split[2]}{split[3]}"))


def model_class(config: Any) -> Any:
    """Return the class that a model's ``config`` names; an automatic one when transformers does not have it."""
    import transformers

    return getattr(transformers, next(iter(config.architectures or []), ""), transformers.AutoModelForCausalLM)


def _matches(name: str, pattern: str) -> bool:
    # To fnmatch a star may stand for folders too.
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, processor and chat template files unchanged, each put in place at once; return their names."""
    copied = []
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source).as_posix()
        if not file.is_file() or not any(_matches(name, pattern) for pattern in COMPANIONS):
            continue
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{file.name}.", dir=place.parent)
        os.close(handle)
        try:
            shutil.copyfile(file, beside)
            Path(beside).chmod(0o644)
            Path(beside).replace(place)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
        copied.append(name)
    return copied
