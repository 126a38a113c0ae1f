"""What is finished: one file a block, written beside and renamed, so that a killed run goes on where it was.

A run is known by its fingerprint: model files, config, plan, samples and options. Another run's folder is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qhub.errors import CheckpointError

__all__ = ["JOURNAL", "Journal", "fingerprint"]

logger = logging.getLogger("qhub")

# The file that says which run a folder belongs to.
JOURNAL = "journal.json"


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Return a digest of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """Keeps the finished blocks of one run in ``folder``.

    Raises :class:`CheckpointError` when the folder belongs to another run, unless that is to be thrown away
    (``anew``). ``facts``: what the run depends on.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], anew: bool = False) -> None:
        self.folder = folder
        head = folder / JOURNAL
        mine = {"fingerprint": fingerprint(facts), "facts": json.loads(json.dumps(facts, default=str))}
        if head.is_file():
            found = json.loads(head.read_text())
            if found["fingerprint"] == mine["fingerprint"]:
                return
            if not anew:
                known = found.get("facts", {})
                other = sorted(k for k in {*known, *mine["facts"]} if known.get(k) != mine["facts"].get(k))
                raise CheckpointError(
                    f"{folder} holds the beginning of another run (it differs in {', '.join(other)}): remove that "
                    "folder to begin anew, or give the same model, settings and data as before to go on with it"
                )
            logger.warning("starting anew: %s held the work of another run", folder)
            for file in folder.glob("*.safetensors"):
                file.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        _write(head, json.dumps(mine, indent=1).encode())

    def finished(self, block: str) -> bool:
        """Return whether ``block`` was finished before."""
        return self._file(block).is_file()

    def write(self, block: str, tensors: Mapping[str, Tensor], note: Any) -> None:
        """Keep the tensors of ``block`` and a plain ``note``."""
        file = self._file(block)
        beside = file.with_suffix(".part")
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            beside,
            metadata={"note": json.dumps(note)},
        )
        with beside.open("rb") as opened:
            os.fsync(opened.fileno())
        beside.replace(file)

    def read(self, block: str) -> tuple[dict[str, Tensor], Any]:
        """Return the tensors and the note of a finished block."""
        with safe_open(self._file(block), framework="pt") as opened:
            note = json.loads(opened.metadata()["note"])
            return {name: opened.get_tensor(name) for name in opened.keys()}, note  # noqa: SIM118

    def _file(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def _write(file: Path, data: bytes) -> None:
    beside = file.with_suffix(".part")
    beside.write_bytes(data)
    beside.replace(file)
