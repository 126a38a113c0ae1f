"""The mapping of one model: every tensor of its GGUF file to a parameter, every parameter to its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from qhub.errors import CheckpointError, UnsupportedError
from qhub_gguf.names.architectures import ARCHITECTURES, architecture_of_config
from qhub_gguf.names.entry import Entry
from qhub_gguf.names.rules import Rule, pattern

__all__ = ["Mapping"]


class Mapping:
    """Translates names for one config.

    Parameter names are those of the model class with its head (``LlamaForCausalLM``: ``model.layers.0...``). For the
    class without it, whose names lack ``base_prefix``, give ``prefix=False`` to the methods.
    """

    def __init__(self, architecture: str, config: Any) -> None:
        self.architecture, self.config = architecture, config
        described = ARCHITECTURES[architecture]
        self.base_prefix = described.base_prefix
        family = described.family(config)
        self._ignored = [re.compile(text) for text in family.ignored]
        self._computed = [re.compile(text) for text in family.computed]
        # Later rules win: the first match of the reversed lists counts.
        self._from_file: list[tuple[re.Pattern[str], Rule, tuple[str, str]]] = []
        self._from_model: list[tuple[re.Pattern[str], Rule, tuple[str, str]]] = []
        for rule in reversed(family.rules):
            for suffix in rule.suffixes:
                self._from_file.append((pattern(rule.ggml + suffix[0]), rule, suffix))
                self._from_model.append((pattern(rule.hf + suffix[1]), rule, suffix))

    @classmethod
    def for_config(cls, config: Any, architecture: str | None = None) -> Mapping:
        """Return the mapping for a transformers config; ``architecture``: the file's, if there is one.

        Raises :class:`UnsupportedError` for a model type that GGUF has no names for here.
        """
        known = architecture is not None and architecture in ARCHITECTURES
        return cls(architecture if known and architecture else architecture_of_config(config), config)

    def entry(self, tensor: str, prefix: bool = True) -> Entry | None:
        """Return where the file's ``tensor`` goes; None: into no parameter (frequencies of rotary embeddings, blocks
        for multi-token prediction). Raises :class:`CheckpointError` for a name that the architecture does not have."""
        for expression, rule, (_ggml_end, hf_end) in self._from_file:
            if found := expression.fullmatch(tensor):
                return Entry(tensor, self._shown(rule.hf.format(**found.groupdict()) + hf_end, prefix), rule.recipe)
        if any(expression.fullmatch(tensor) for expression in self._ignored):
            return None
        raise CheckpointError(
            f"tensor {tensor!r} is none of those that a GGUF file of architecture {self.architecture!r} has"
        )

    def of_file(self, tensors: Iterable[str], prefix: bool = True) -> dict[str, list[Entry]]:
        """Return for each parameter the entries that make it up, in the order of their parts."""
        found: dict[str, list[Entry]] = {}
        for tensor in tensors:
            entry = self.entry(tensor, prefix)
            if entry is not None:
                found.setdefault(entry.hf, []).append(entry)
        for name, entries in found.items():
            if len(entries) > 1:
                if any(entry.recipe.part is None for entry in entries):
                    raise CheckpointError(f"{[entry.ggml for entry in entries]} all claim the parameter {name!r}")
                entries.sort(key=lambda entry: entry.recipe.part.index if entry.recipe.part else 0)
        return found

    def of_model(self, parameters: Iterable[str], prefix: bool = True) -> dict[str, list[Entry]]:
        """Return for each parameter (or buffer) of a model the tensors of a file that hold it, for writing.

        Parameters that no file stores (tied, or computed) are left out. Raises :class:`UnsupportedError` naming those
        that the architecture has no tensor for.
        """
        found, unknown = {}, []
        for name in parameters:
            full = name if prefix or self._is_head(name) else self.base_prefix + name
            if any(expression.fullmatch(full) for expression in self._computed):
                continue
            entries = self._entries_of(full, name)
            if entries:
                found[name] = entries
            else:
                unknown.append(name)
        if unknown:
            raise UnsupportedError(
                f"GGUF's architecture {self.architecture!r} has no tensor for {len(unknown)} parameters of this model: "
                f"{unknown[:5]}"
            )
        return found

    def _entries_of(self, full: str, shown: str) -> list[Entry]:
        found: dict[str, Entry] = {}
        for expression, rule, (ggml_end, _) in self._from_model:
            match = expression.fullmatch(full)
            if match is None:
                continue
            tensor = rule.ggml.format(**match.groupdict()) + ggml_end
            if rule.recipe.part is None:
                # A parameter that is one tensor: the last rule for it wins.
                return list(found.values()) or [Entry(tensor, shown, rule.recipe)]
            found.setdefault(tensor, Entry(tensor, shown, rule.recipe))
        return sorted(found.values(), key=lambda entry: entry.recipe.part.index if entry.recipe.part else 0)

    def _is_head(self, name: str) -> bool:
        return name.startswith((self.base_prefix, "lm_head."))

    def _shown(self, name: str, prefix: bool) -> str:
        return name if prefix else name.removeprefix(self.base_prefix)
