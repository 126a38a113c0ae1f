"""Loads what commands work on: models of whatever class, tokenizers, the files beside the weights."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from qhub.errors import CheckpointError
from qhub.integrations.transformers.folders import COMPANIONS, copy_companions, local_folder, model_class, weight_files

__all__ = [
    "DeviceMap",
    "Dtype",
    "Model",
    "check_target",
    "copy_companions",
    "existing",
    "load_config",
    "load_model",
    "load_tokenizer",
    "local_folder",
    "parse_device_map",
    "parse_dtype",
    "weight_files",
    "weight_sizes",
]


def existing(model: str | None) -> str | None:
    """Return ``model`` if it can be one: a folder with a config.json, or a name that the Hub could have.

    A path that leads nowhere and a folder without a config.json are wrong usage; nothing is imported to see that.
    """
    if model is None:
        return None
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise typer.BadParameter(f"the folder {model} has no config.json, so it is no model")
        return str(path)
    if path.exists():
        raise typer.BadParameter(f"{model} is a file, not a folder with a model")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise typer.BadParameter(f"there is no folder {model}")
    return model


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with a model, or the name of one on the Hub.",
        show_default=False,
        callback=existing,
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto: as the checkpoint has it.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help='Where the model goes: auto, cpu, cuda:0, or JSON such as {"": "cpu"}.',
        show_default="the CPU",
    ),
]

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def check_target(model: str, out: Path, overwrite: bool) -> None:
    """Make ``out`` wrong usage where it is a file, the folder of ``model``, or not empty, unless ``overwrite``."""
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a folder", param_hint="--out")
    source = Path(model)
    if out.exists() and source.exists() and out.samefile(source):
        raise typer.BadParameter(
            "it is the folder of MODEL, whose weights would be replaced: take another", param_hint="--out"
        )
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise typer.BadParameter(f"the folder {out} is not empty: take another, or add --overwrite", param_hint="--out")


def parse_dtype(name: str) -> Any:
    """Return the torch dtype of that ``name``, or ``"auto"``; anything else is wrong usage."""
    import torch

    if name == "auto":
        return name
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise typer.BadParameter(
            f"{name!r} is no float dtype: take auto, float32, bfloat16 or float16", param_hint="--dtype"
        )
    return dtype


def parse_device_map(text: str | None) -> Any:
    """Return a device map for transformers: a word as it is, JSON as a dict."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}", param_hint="--device-map") from error


def load_config(model: str) -> Any:
    """Return the model's config.

    Raises :class:`CheckpointError` when transformers does not know such a model.
    """
    from transformers import AutoConfig

    from qhub.integrations.transformers.companions import complete

    try:
        config = AutoConfig.from_pretrained(model)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the config.json of {model} is none that transformers reads: {error}") from error
    complete(config)
    return config


def load_model(model: str, **options: Any) -> Any:
    """Return the model, in the class that its config names; ``options``: for ``from_pretrained``."""
    from qhub.integrations.transformers import install

    # Whoever calls qhub by name wants it, with the automatic loading off too.
    install()
    return model_class(load_config(model)).from_pretrained(model, **options)


def load_tokenizer(*models: str) -> Any:
    """Return the tokenizer of the first of ``models`` that has one.

    Raises :class:`CheckpointError` when none has.
    """
    from transformers import AutoTokenizer

    failures = []
    for model in models:
        folder = local_folder(model)
        if not any(fnmatch.fnmatch(file.name, pattern) for file in folder.iterdir() for pattern in COMPANIONS[:3]):
            failures.append(f"{model} has no tokenizer files")
            continue
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (ValueError, KeyError, TypeError) as error:
            failures.append(f"{model}: {error}")
    raise CheckpointError(f"no tokenizer: {'; '.join(failures)}. Name a folder that has one with --tokenizer")


def weight_sizes(model: str) -> list[int]:
    """Return the bytes of each weight file of ``model``; for one on the Hub without downloading them.

    Raises :class:`CheckpointError` when there are no safetensors files.
    """
    folder = local_folder(model)
    sizes = [file.stat().st_size for file in weight_files(folder)]
    if not sizes and not Path(model).is_dir():
        from huggingface_hub import HfApi

        listed = {
            file.rfilename: file.size or 0 for file in HfApi().model_info(model, files_metadata=True).siblings or []
        }
        sizes = [size for name, size in listed.items() if _WEIGHTS.fullmatch(name)]
    if not sizes:
        raise CheckpointError(f"{model} has no safetensors file: there are no weights to look into")
    return sizes
