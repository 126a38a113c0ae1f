"""Runs a small Hugging Face Hub on loopback, for tests that need the real client to push and to download.

The server speaks the Hub's own protocol to an unmodified ``huggingface_hub`` (1.33 and 2.4 are tested): users
with tokens, public, private and gated repositories, commits, branches, git tags, model cards, LFS uploads
whole or in parts, range requests, and LFS downloads that are redirected to a second origin. As on the Hub, a
new repository starts with an initial commit that holds ``.gitattributes``. Xet, search and discussions are
missing.

It is built on the standard library's ``ThreadingHTTPServer``: that adds no dependency, streams bodies both
ways, and leaves the socket in reach, without which a connection cannot be cut in the middle of a body. A WSGI
or ASGI server is made to hide exactly that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from qhub.testing.hub import commits, files, lfs, repos
from qhub.testing.hub.client import activated, client_environment
from qhub.testing.hub.faults import Faults
from qhub.testing.hub.state import HubState, Limits, Served
from qhub.testing.hub.store import Blobs, Commit, Repo, Store, StoredFile
from qhub.testing.hub.wire import Listener

__all__ = ["Commit", "Faults", "HubServer", "Limits", "Repo", "Served", "StoredFile"]


class HubServer:
    """Serves a Hub on 127.0.0.1 while the ``with`` block runs, and forgets everything after it.

    ``tokens`` maps each valid token to its user, whose name is also the one namespace it may write to; None
    means that there are no users. ``limits`` bounds what clients may send; None means the defaults of Limits.

    Leaving the block raises RuntimeError when the server itself failed on a request, which a retrying client
    could have hidden.
    """

    def __init__(self, *, tokens: Mapping[str, str] | None = None, limits: Limits | None = None) -> None:
        self._tokens = dict(tokens or {})
        self._limits = limits or Limits()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._state: HubState | None = None
        self._listeners: list[Listener] = []

    def __enter__(self) -> HubServer:
        """Start serving."""
        # A request that a client abandoned may still be writing while the folder goes.
        self._folder = tempfile.TemporaryDirectory(prefix="qhub-hub-", ignore_cleanup_errors=True)
        self._state = state = HubState(Store(self._root / "storage"), self._tokens, self._limits)
        hub_routes = (*repos.ROUTES, *commits.ROUTES, *lfs.ROUTES, *files.ROUTES)
        hub = Listener(state, hub_routes, storage=False)
        storage = Listener(state, (*lfs.STORAGE_ROUTES, *files.STORAGE_ROUTES), storage=True)
        state.endpoint, state.storage = hub.url, storage.url
        self._listeners = [hub, storage]
        for listener in self._listeners:
            listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop serving and delete everything. Raises RuntimeError when the server failed on a request."""
        for listener in self._listeners:
            listener.stop()
        if self._folder is not None:
            self._folder.cleanup()
        failures = self.state.errors
        self._listeners, self._folder, self._state = [], None, None
        if failures and error is None:
            raise RuntimeError(f"the hub server failed on {len(failures)} request(s)") from failures[0]

    @property
    def state(self) -> HubState:
        """Return what the requests share. Raises RuntimeError when the server is not running."""
        if self._state is None:
            raise RuntimeError("the hub server is not running: use it in a with block")
        return self._state

    @property
    def endpoint(self) -> str:
        """Return the address to give to clients, such as ``http://127.0.0.1:40123``."""
        return self.state.endpoint

    @property
    def faults(self) -> Faults:
        """Return where to order failures."""
        return self.state.faults

    @property
    def requests(self) -> list[Served]:
        """Return the log of answered requests, the oldest first; clear it to start counting anew."""
        return self.state.served

    def repo(self, repo_id: str, *, repo_type: str = "model") -> Repo:
        """Look into a repository. Raises KeyError when there is none."""
        repo = self.state.store.get(repo_type, repo_id)
        if repo is None:
            raise KeyError(f"the hub server has no {repo_type} repository {repo_id!r}")
        return repo

    def add_repo(self, repo_id: str, contents: Mapping[str, bytes], *, private: bool = False) -> Repo:
        """Create a model repository with these files without a client, as a test's starting point.

        Raises ValueError when it exists already, and HubError for a path that the Hub would refuse.
        """
        store = self.state.store
        entries = [self._stored(commits.check_path(path), content) for path, content in contents.items()]
        repo = store.create("model", repo_id, private=private)
        if repo is None:
            raise ValueError(f"the hub server has a repository {repo_id!r} already")
        repo.lfs_objects.update(entry.sha256 for entry in entries if entry.sha256 is not None)
        repo.commit(
            {**repo.files, **{entry.path: entry for entry in entries}},
            title="add files",
            author=repo.owner,
            parent=repo.head.oid,
            ref="refs/heads/main",
        )
        return repo

    def environment(self, *, token: str | None = None, cache_dir: Path | str | None = None) -> dict[str, str]:
        """Build the environment variables that point another process's client at the server.

        Lay them over its own ones: ``{**os.environ, **hub.environment()}``. ``token=None`` means no token.
        ``cache_dir`` becomes HF_HOME; None means a new empty folder that goes when the server stops.
        """
        return client_environment(self.endpoint, self._home(cache_dir), token)

    @contextmanager
    def activate(
        self,
        *,
        token: str | None = None,
        cache_dir: Path | str | None = None,
    ) -> Iterator[HubServer]:
        """Point the client of this process at the server inside a ``with`` block, and restore it after.

        The arguments mean what they mean to ``environment``, whose variables are set as well. ``HfApi``
        objects made before the block keep their endpoint. Blocks of several threads would disturb each other.
        """
        with activated(self.endpoint, self._home(cache_dir), token):
            yield self

    @property
    def _root(self) -> Path:
        if self._folder is None:
            raise RuntimeError("the hub server is not running: use it in a with block")
        return Path(self._folder.name)

    def _home(self, cache_dir: Path | str | None) -> Path:
        if cache_dir is None:
            cache_dir = tempfile.mkdtemp(prefix="home-", dir=self._root)
        # Another process may read the variable in another working directory.
        return Path(cache_dir).absolute()

    def _stored(self, path: str, content: bytes) -> StoredFile:
        blobs: Blobs = self.state.store.blobs
        if content and commits.uses_lfs(path, len(content), self._limits.lfs):
            return blobs.add_lfs(path, content)
        return blobs.add_regular(path, content)
