"""Pushes quantized models to the Hub: files and model card in one commit; a card that somebody wrote is kept.

transformers' own push replaces the card that was saved with the model by a template, takes a Hub that does not answer
for a repository without a card, and leaves weight files in the repository that the new ones have replaced. So the push
of a quantized model is made here, of the Hub client's public calls.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qhub.errors import CheckpointError

__all__ = ["Push", "push_quantized", "start_push"]

logger = logging.getLogger("qhub")

_CARD = "README.md"
_WEIGHTS = re.compile(r"(?P<checkpoint>.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Push:
    """Is a push that has begun: the repository exists, its card is read, nothing is uploaded yet.

    ``card``: the repository's; None when it has none. ``tags``: to add to the card besides qhub's own.
    """

    api: Any
    repo_id: str
    card: str | None
    tags: tuple[str, ...]
    revision: str | None
    create_pr: bool
    commit_message: str | None
    commit_description: str | None

    def send(self, model: Any, folder: Path, files: Iterable[Path]) -> Any:
        """Upload ``files`` of ``folder`` and the card in one commit, and return the client's ``CommitInfo``.

        ``files``: relative to ``folder``. A card among them goes up only if somebody wrote or edited it, and the
        repository has none of that kind. The commit also deletes the repository's shards, index or whole file of an
        earlier push that would be loaded beside or instead of the new weights. Raises :class:`CheckpointError` for a
        card that cannot be read, and the client's errors.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        names = {file.as_posix() for file in files}
        local = _text((folder / _CARD).read_bytes(), str(folder / _CARD)) if _CARD in names else None
        card = self._card(model, local)
        names.discard(_CARD)
        self._create_branch()
        operations = [
            *(CommitOperationDelete(name) for name in self._replaced(names)),
            *(CommitOperationAdd(name, folder / name) for name in sorted(names)),
            CommitOperationAdd(_CARD, card.encode()),
        ]
        return self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=self.commit_message or f"Upload {type(model).__name__}",
            commit_description=self.commit_description,
            create_pr=self.create_pr,
            revision=self.revision,
        )

    def _card(self, model: Any, local: str | None) -> str:
        from qhub.integrations.model_card import card_tags, card_text, is_untouched, with_tags

        theirs = {f"{_CARD} of {self.repo_id}": self.card, f"the local {_CARD}": local}
        for source, text in theirs.items():
            if text is not None and not is_untouched(text):
                logger.info("%s is kept: see whether it fits the new weights", source)
                return with_tags(text, [*card_tags(model), *self.tags], source)
        return card_text(model, self.repo_id, self.tags, previous=self.card or local)

    def _create_branch(self) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        if self.revision is None or self.revision.startswith("refs/pr"):
            return
        try:
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        except HfHubHTTPError as error:
            # Who may only open a pull request cannot make branches; if the branch is missing, the commit says so.
            if not (self.create_pr and error.response.status_code == 403):
                raise

    def _replaced(self, names: set[str]) -> list[str]:
        """Return the files of the repository that hold an earlier version of the checkpoints in ``names``."""
        checkpoints = {match["checkpoint"] for match in map(_WEIGHTS.fullmatch, names) if match}
        old = []
        for name in sorted(set(self.api.list_repo_files(self.repo_id, revision=self.revision)) - names):
            match = _WEIGHTS.fullmatch(name)
            if match and match["checkpoint"] in checkpoints:
                logger.info("deleting %s from %s: the new checkpoint does not have it", name, self.repo_id)
                old.append(name)
        return old


def start_push(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: str | Iterable[str] | None = None,
    **options: Any,
) -> Push:
    """Create the repository unless it exists, read its card, and return the push to go on with.

    The arguments are those of transformers' ``push_to_hub``; ``options`` (``private``, ...) go to the client's
    ``create_repo``. A wrong token, a missing right or a Hub that is down ends here, before the model is saved.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="qhub")
    repo_id = api.create_repo(repo_id, exist_ok=True, **options).repo_id
    more = [tags] if isinstance(tags, str) else tags or []
    return Push(
        api=api,
        repo_id=repo_id,
        card=_published_card(api, repo_id, revision),
        tags=tuple(dict.fromkeys([*(getattr(model, "model_tags", None) or []), *more])),
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
    )


def push_quantized(
    model: Any, original: Any, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any
) -> Any:
    """Push a quantized model like transformers' ``push_to_hub`` (``original``), with qhub's card; return the commit.

    ``options``: see :func:`start_push`. A model with an adapter loaded is left to transformers, which pushes the
    adapter only.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return original(model, repo_id, max_shard_size=max_shard_size, **options)
    push = start_push(model, repo_id, **options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return push.send(model, folder, (f.relative_to(folder) for f in folder.rglob("*") if f.is_file()))


def _published_card(api: Any, repo_id: str, revision: str | None) -> str | None:
    """Return the card at ``revision``, or on the main branch while there is no such revision; None without a card."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    # An empty cache: a card from the cache would be an old one when the Hub does not answer.
    with tempfile.TemporaryDirectory() as cache:
        try:
            file = api.hf_hub_download(repo_id, _CARD, revision=revision, cache_dir=cache)
        except LocalEntryNotFoundError:
            # The client's word for "the Hub did not answer", and a kind of EntryNotFoundError.
            raise
        except EntryNotFoundError:
            return None
        except RevisionNotFoundError:
            if revision is None:
                raise
            return _published_card(api, repo_id, None)
        return _text(Path(file).read_bytes(), f"{_CARD} of {repo_id}")


def _text(content: bytes, source: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source} is not UTF-8 text: {error}. Correct or delete it, then push again") from error
