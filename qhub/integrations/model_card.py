"""Writes the model card of a quantized model: method, bits measured, base model, how to load it, tags for the Hub.

A card ends with a digest of itself. While that fits, nobody has changed the card and qhub may write it anew; a card
that somebody edited is theirs and is kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qhub.errors import CheckpointError

__all__ = ["card_tags", "card_text", "is_untouched", "with_tags", "write_card"]

logger = logging.getLogger("qhub")

_SEAL = re.compile(r"<!-- qhub wrote this card, and rewrites it unless you edit it: ([0-9a-f]{16}) -->\n\Z")
_BITS = re.compile(r"\d+-bit")
# These also list classes that a more telling Auto class lists.
_GENERAL = ("AutoModelForPreTraining", "AutoModelForMultimodalLM")


def card_text(model: Any, repo_id: str | None = None, tags: Iterable[str] = (), previous: str | None = None) -> str:
    """Return the model card of a quantized ``model``: YAML header, then Markdown.

    ``repo_id``: the repository it is for; None for a folder. ``tags``: to list besides qhub's own. ``previous``: the
    card of qhub's that this one replaces, which gives its base model and further tags; None when there is none. The
    base model is left out when the model came from a local folder without a card that names one.
    """
    from huggingface_hub import ModelCardData

    from qhub.integrations.transformers.saving import bits_per_weight, dtype_name
    from qhub.registry import registry

    quantizer = model.hf_quantizer
    method = quantizer.method
    plugin = registry.list()[method]
    bits, count, total = bits_per_weight(model)
    base, relation = _base_model(model, repo_id, previous)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_task(model),
        base_model=base,
        base_model_relation=relation,
        tags=list(dict.fromkeys([*card_tags(model), *_lasting_tags(previous), *tags])),
    )
    bases = base if isinstance(base, list) else [base] if base else []
    links = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in bases)
    # A plugin that was registered by a call comes in no package that one could install.
    package = plugin.distribution if not plugin.distribution.startswith("(") else None
    version = f" ({package} {plugin.version})" if package else ""
    auto = _auto_class(model)
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {type(model).__name__}, quantized with {method}",
        "",
        "| | |",
        "|---|---|",
        *([f"| base model | {links} |"] if links else []),
        f"| method | `{method}`{version} |",
        f"| bits per quantized weight | {bits:.3f}, scales and zeros counted |",
        f"| quantized weights | {count:,} in {len(quantizer.plan)} tensors |",
        f"| other weights | {dtype_name(model.dtype)} |",
        f"| size of all parameters | {total:,} bytes |",
        "",
        "## Load it",
        "",
        "```python",
        *([f"# pip install {package}"] if package else []),
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{repo_id or "THIS_FOLDER_OR_REPOSITORY"}")',
        "```",
        "",
        "Nothing else is to be imported: transformers finds the installed plugin by itself.",
    ]
    if quantizer.replaces:
        lines.append(f"The files are in the field's format for {method}: what else reads that reads them without qhub.")
    return _sealed("\n".join(lines) + "\n\n")


def write_card(model: Any, folder: Path, previous: Path | None = None) -> None:
    """Write ``README.md`` into ``folder``: a copy of ``previous`` if that is one that somebody edited, else a new card.

    A model with an adapter loaded gets no card of qhub's: transformers saves the adapter only.
    """
    old = previous.read_bytes() if previous is not None and previous.exists() else None
    if old is not None and not is_untouched(old.decode("utf-8", errors="replace")):
        (folder / "README.md").write_bytes(old)
    elif not getattr(model, "_hf_peft_config_loaded", False):
        text = card_text(model, previous=old.decode("utf-8") if old is not None else None)
        (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")


def card_tags(model: Any) -> list[str]:
    """Return the tags of a quantized ``model``: ``qhub``, the method, ``quantized``, the size of a code (``4-bit``)."""
    from qhub.tensor import QuantizedTensor

    coded = count = 0
    for parameter in model.parameters():
        if isinstance(parameter, QuantizedTensor):
            # People say "4-bit" for 4-bit codes, whatever scales and tables take: codes are integers or 8-bit floats.
            # In the order of files: tiles have room for rows and columns that are not there.
            plain = parameter.in_plain_order()
            layout = plain.quant_layout
            parts = [plain.parts[name] for name in layout.core_specs().keys() - layout.scale_tensors().keys()]
            coded += sum(p.nbytes for p in parts if not p.is_floating_point() or p.element_size() == 1)
            count += parameter.numel()
    bits = [f"{round(8 * coded / count)}-bit"] if coded else []
    return ["qhub", model.hf_quantizer.method, "quantized", *bits]


def is_untouched(card: str) -> bool:
    """Return whether ``card`` is one that qhub wrote, and exactly as it wrote it."""
    seal = _SEAL.search(card)
    return seal is not None and _digest(card[: seal.start()]) == seal[1]


def with_tags(card: str, tags: Iterable[str], source: str) -> str:
    """Return ``card`` with ``tags`` added to its header; as it is, to the byte, if it has them all.

    Raises :class:`CheckpointError`, naming ``source``, when the header cannot be read.
    """
    parsed = _parse(card, source)
    # One tag may stand there without the list.
    present = parsed.data.tags if isinstance(parsed.data.tags, list) else [parsed.data.tags] if parsed.data.tags else []
    missing = [tag for tag in dict.fromkeys(tags) if tag not in present]
    if not missing:
        return card
    parsed.data.tags = [*present, *missing]
    return str(parsed)


def _parse(card: str, source: str) -> Any:
    import yaml
    from huggingface_hub import ModelCard

    try:
        return ModelCard(card)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        advice = "Correct or delete that card, then try again"
        raise CheckpointError(f"the header of {source} is not valid: {error}. {advice}") from error


def _lasting_tags(previous: str | None) -> list[str]:
    """Return the tags of the card that is replaced, those left out that described what was quantized then."""
    from qhub.registry import registry

    tags = (_parse(previous, "the previous model card").data.tags or []) if previous is not None else []
    return [tag for tag in tags if not _BITS.fullmatch(tag) and tag not in registry.list()]


def _base_model(model: Any, repo_id: str | None, previous: str | None) -> tuple[Any, str | None]:
    """Return (base model, how this one derives from it), as a card's header has them; None where unknown.

    The relation is left to the Hub when the model was loaded quantized: it may have been trained or merged since.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = str(getattr(model.config, "_name_or_path", "") or "")
    folder = Path(name)
    card = "the previous model card"
    # A local path says nothing to others, and is nobody's business; the card of what lies there may say more.
    if os.path.exists(name):  # noqa: PTH110 - Path.exists raises on a name that is too long for a path
        readme = folder / "README.md"
        if previous is None and readme.is_file():
            previous, card = readme.read_text(encoding="utf-8", errors="replace"), str(readme)
    elif name and name != repo_id:
        try:
            validate_repo_id(name)
        except HFValidationError:
            logger.info("the model card names no base model: %r is neither a folder nor a name on the Hub", name)
        else:
            return name, None if model.hf_quantizer.pre_quantized else "quantized"
    if previous is None:
        return None, None
    try:
        data = _parse(previous, card).data
    except CheckpointError as error:
        logger.warning("the model card names no base model: %s", error)
        return None, None
    return data.base_model, data.get("base_model_relation")


def _auto_class(model: Any) -> str:
    """Return the Auto class that loads ``model``, or its own class where none does."""
    from transformers.models.auto import modeling_auto

    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and type(model.config) in mapping:
            listed = mapping[type(model.config)]
            if type(model) in (listed if isinstance(listed, tuple) else (listed,)):
                found.append(name)
    # The module goes from the general to the special.
    telling = [name for name in found if name not in _GENERAL]
    return (telling or found or [type(model).__name__])[-1]


def _task(model: Any) -> str | None:
    """Return the Hub's name for what ``model`` does, by transformers' own table for cards; None for a bare model."""
    from transformers.modelcard import TASK_MAPPING

    name = type(model).__name__
    found = None
    tables: dict[str, dict[str, Any]] = TASK_MAPPING  # type: ignore[assignment]
    for task, classes in tables.items():
        if any(name == entry or (isinstance(entry, (tuple, list)) and name in entry) for entry in classes.values()):
            found = task
    return found


def _sealed(text: str) -> str:
    return f"{text}<!-- qhub wrote this card, and rewrites it unless you edit it: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
