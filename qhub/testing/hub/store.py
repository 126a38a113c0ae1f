"""Stores repositories: their commits and references in memory, the bytes of their files on disk by hash."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from qhub.testing.hub.card import card_data, card_tags
from qhub.testing.hub.replies import HubError

__all__ = ["Blobs", "Commit", "Repo", "Store", "StoredFile"]

# What the Hub writes into a new repository's .gitattributes, shortened to the formats that models come in.
LFS_PATTERNS = (
    *("*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.gguf", "*.gz", "*.h5", "*.joblib", "*.model"),
    *("*.msgpack", "*.npy", "*.npz", "*.onnx", "*.parquet", "*.pickle", "*.pkl", "*.pt", "*.pth"),
    *("*.safetensors", "*.tar", "*.tgz", "*.xz", "*.zip", "*.zst", "*tfevents*"),
)


@dataclass(frozen=True)
class StoredFile:
    """Describes one file of a commit.

    ``oid`` is its git object id; ``sha256`` is set for an LFS file and None for a regular one; ``source`` is
    where its bytes are.
    """

    path: str
    size: int
    oid: str
    sha256: str | None
    source: Path

    @property
    def etag(self) -> str:
        """Return what identifies the content: the sha256 of an LFS file, the git id of a regular one."""
        return self.sha256 or self.oid

    @property
    def lfs(self) -> bool:
        """Tell whether the file is stored with LFS."""
        return self.sha256 is not None

    @property
    def pointer_size(self) -> int:
        """Return the size of the git-lfs pointer that stands for an LFS file."""
        return len(_lfs_pointer(self.sha256 or "", self.size))

    def read_bytes(self) -> bytes:
        """Read the whole content."""
        return self.source.read_bytes()


@dataclass(frozen=True)
class Commit:
    """Describes one commit and the full set of files it leaves; ``parent`` is None for the first one."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: datetime
    files: Mapping[str, StoredFile]

    @property
    def card(self) -> str:
        """Return the text of README.md, or an empty text when the commit has none."""
        readme = self.files.get("README.md")
        return "" if readme is None else readme.read_bytes().decode("utf-8", "replace")


@dataclass
class Repo:
    """Holds one repository. ``files``, ``commits``, ``tags`` and ``card`` speak of its main branch."""

    id: str
    type: str
    private: bool
    gated: bool = False
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    refs: dict[str, str] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    lfs_objects: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def owner(self) -> str:
        """Return the namespace."""
        return self.id.split("/")[0]

    @property
    def head(self) -> Commit:
        """Return the newest commit of main."""
        return self.history[self.refs["refs/heads/main"]]

    @property
    def files(self) -> Mapping[str, StoredFile]:
        """Return the files on main by their path, ``.gitattributes`` of the initial commit included."""
        return self.head.files

    @property
    def commits(self) -> list[Commit]:
        """List the commits of main, the newest first; the last is the Hub's own initial commit."""
        return self.log(self.head)

    @property
    def card(self) -> str:
        """Return the text of README.md on main, or an empty text when there is none."""
        return self.head.card

    @property
    def tags(self) -> list[str]:
        """List the tags of the card on main, the way the Hub derives them."""
        return card_tags(card_data(self.card))

    def read(self, path: str) -> bytes:
        """Read a file on main. Raises KeyError when there is none at ``path``."""
        return self.files[path].read_bytes()

    def at(self, revision: str) -> Commit | None:
        """Return the commit that a branch, tag, full reference or commit id names, or None."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.history[self.refs[name]]
        return self.history.get(revision)

    def branch(self, revision: str) -> str | None:
        """Return the full reference that commits to ``revision`` move; None when it is no branch."""
        names = (f"refs/heads/{revision}", revision)
        return next((name for name in names if name in self.refs and not name.startswith("refs/tags/")), None)

    def log(self, commit: Commit) -> list[Commit]:
        """List a commit and its ancestors, the newest first."""
        commits = [commit]
        while commits[-1].parent is not None:
            commits.append(self.history[commits[-1].parent])
        return commits

    def commit(
        self,
        files: Mapping[str, StoredFile],
        *,
        title: str,
        message: str = "",
        author: str,
        parent: str | None,
        ref: str,
    ) -> Commit:
        """Record a commit with exactly these files on top of ``parent`` and point ``ref`` at it."""
        date = datetime.now(UTC)
        listing = sorted((file.path, file.oid) for file in files.values())
        # The clock makes two commits of the same files differ, as git's own timestamps do.
        identity = repr((parent, title, message, author, listing, time.time_ns()))
        oid = hashlib.sha1(identity.encode(), usedforsecurity=False).hexdigest()
        commit = Commit(oid, parent, title, message, author, date, dict(files))
        self.history[oid] = commit
        self.refs[ref] = oid
        return commit


class Blobs:
    """Keeps file contents on disk under their hash, so that no name from a request becomes a file name."""

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self.incoming = root / "incoming"
        for folder in (self._objects, self.incoming):
            folder.mkdir(parents=True, exist_ok=True)

    def add_regular(self, path: str, content: bytes) -> StoredFile:
        """Store the content of a regular (git) file."""
        oid = _git_oid(content)
        target = self._objects / oid
        if not target.exists():
            handle, name = tempfile.mkstemp(dir=self.incoming)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(name).replace(target)
        return StoredFile(path, len(content), oid, None, target)

    def add_lfs(self, path: str, content: bytes) -> StoredFile:
        """Store the content of an LFS file that comes from no upload."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.receive([content], size=len(content), sha256=sha256)
        return self.lfs_file(path, sha256)

    def lfs_file(self, path: str, sha256: str) -> StoredFile:
        """Describe a stored LFS object as the file at ``path``. Raises FileNotFoundError without one."""
        source = self._objects / sha256
        size = source.stat().st_size
        return StoredFile(path, size, _git_oid(_lfs_pointer(sha256, size)), sha256, source)

    def receive(self, pieces: Iterable[bytes], *, size: int, sha256: str | None = None) -> tuple[Path, str]:
        """Store a streamed content and return its path and sha256.

        ``sha256=None`` accepts any content (one part of an upload) and leaves it in the incoming folder.
        Raises HubError 400 when size or hash differ from what was announced; nothing is kept then.
        """
        digest = hashlib.sha256()
        received = 0
        handle, name = tempfile.mkstemp(dir=self.incoming)
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    received += len(piece)
                    if received > size:
                        raise HubError(400, f"the upload is longer than the {size} bytes announced")
                    digest.update(piece)
                    file.write(piece)
            found = digest.hexdigest()
            if received != size or sha256 not in (None, found):
                raise HubError(400, f"expected {size} bytes of sha256 {sha256}, got {received} of {found}")
        except BaseException:
            Path(name).unlink()
            raise
        target = Path(name)
        if sha256 is not None:
            target = self._objects / sha256
            Path(name).replace(target)
        return target, found


class Store:
    """Finds, creates and deletes repositories by type and id."""

    def __init__(self, root: Path) -> None:
        self.blobs = Blobs(root)
        self._repos: dict[tuple[str, str], Repo] = {}
        self._lock = threading.Lock()

    def get(self, repo_type: str, repo_id: str) -> Repo | None:
        """Return a repository, or None when there is none."""
        return self._repos.get((repo_type, repo_id))

    def create(self, repo_type: str, repo_id: str, *, private: bool) -> Repo | None:
        """Create a repository with the Hub's initial commit; None when the id is taken."""
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repo = Repo(repo_id, repo_type, private)
        first = self.blobs.add_regular(".gitattributes", attributes.encode())
        files = {first.path: first}
        repo.commit(files, title="initial commit", author="system", parent=None, ref="refs/heads/main")
        with self._lock:
            if (repo_type, repo_id) in self._repos:
                return None
            self._repos[repo_type, repo_id] = repo
        return repo

    def delete(self, repo: Repo) -> None:
        """Delete a repository; the bytes of its files stay until the server stops."""
        with self._lock:
            self._repos.pop((repo.type, repo.id), None)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
