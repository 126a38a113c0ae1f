"""Checks that saving twice writes the same bytes, and that a save that fails leaves the previous files whole."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from qhub.testing.conformance.subject import KitBase, Subject
from qhub.testing.conformance.workbench import Workbench

__all__ = ["SavingChecks"]


class SavingChecks(KitBase):
    """Saves over an earlier checkpoint."""

    def test_saving_changes_nothing(self, subject: Subject, bench: Workbench) -> None:
        """Running and saving leave the model as it is: a second save writes the same bytes."""
        first = _digests(bench.saved(subject))
        model = bench.model(subject)
        before = bench.logits(model)
        folder = bench.folder("again")
        model.save_pretrained(folder)
        assert torch.equal(bench.logits(model), before), "saving changed the live model"
        assert _digests(folder) == first, "two saves of one model differ"

    def test_failed_save_leaves_the_previous_files(
        self, single: Subject, bench: Workbench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The disk fills up midway: the error comes through, the old checkpoint is whole, nothing is left beside it."""
        import transformers.modeling_utils as host

        if bench.container:
            pytest.skip(f"{self.method} writes files of its own kind: its own tests interrupt that")
        parent = bench.folder("full")
        folder = parent / "model"
        model = bench.model(single)
        model.save_pretrained(folder, max_shard_size="60KB")
        before = _digests(folder)
        original, written = host.safe_save_file, []

        def full(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
            written.append(filename)
            if len(written) == 2:
                raise OSError(28, "No space left on device")
            return original(tensors, filename, *args, **kwargs)

        monkeypatch.setattr(host, "safe_save_file", full)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(folder, max_shard_size="40KB")
        assert len(written) == 2, "the save did not get as far as its second file"
        assert _digests(folder) == before, "the failed save changed the previous checkpoint"
        assert [entry.name for entry in parent.iterdir()] == ["model"], "the failed save left files behind"
        assert torch.equal(bench.logits(bench.load(folder)), bench.logits(model))


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}
