"""Points huggingface_hub clients at a hub server: other processes by environment, this one by patching."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["activated", "client_environment"]


def client_environment(endpoint: str, home: Path, token: str | None) -> dict[str, str]:
    """Build the environment variables to lay over a process's own ones; ``token=None`` means no token.

    Variables that would win over these are set to nothing, so that no token of the developer is ever sent.
    """
    direct = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    loopback = ",".join(filter(None, [direct, "127.0.0.1", "localhost"]))
    return {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token or "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_OIDC_RESOURCE": "",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        # The client does not ask the server: with hf_xet installed it uploads through Xet unless told not to.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "NO_PROXY": loopback,
        "no_proxy": loopback,
    }


@contextmanager
def activated(endpoint: str, home: Path, token: str | None) -> Iterator[None]:
    """Make the huggingface_hub of this process, and what imported it, talk to ``endpoint`` for a while."""
    # Imported before anything is patched: modules that copy a constant must not keep this server's values.
    import huggingface_hub.hf_api
    import huggingface_hub.utils._cache_manager as cache_manager
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    environment = client_environment(endpoint, home, token)
    values: dict[str, Any] = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": environment["HF_HOME"],
        "HF_HUB_CACHE": environment["HF_HUB_CACHE"],
        "HUGGINGFACE_HUB_CACHE": environment["HF_HUB_CACHE"],
        "HF_ASSETS_CACHE": environment["HF_ASSETS_CACHE"],
        "HUGGINGFACE_ASSETS_CACHE": environment["HF_ASSETS_CACHE"],
        "HF_XET_CACHE": environment["HF_XET_CACHE"],
        "HF_TOKEN_PATH": environment["HF_TOKEN_PATH"],
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_OFFLINE": False,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.multiple(constants, **values))
        stack.enter_context(mock.patch.object(cache_manager, "HF_HUB_CACHE", environment["HF_HUB_CACHE"]))
        # The module's functions (create_repo, upload_folder, ...) are methods of this one instance.
        stack.enter_context(mock.patch.object(huggingface_hub.hf_api.api, "endpoint", endpoint))
        for forget in (_forget_transformers_api, close_session):
            forget()
            stack.callback(forget)
        yield


def _forget_transformers_api() -> None:
    # transformers keeps one HfApi, made at its first use with the endpoint of that moment.
    hub: Any = sys.modules.get("transformers.utils.hub")
    if hasattr(hub, "_hf_api"):
        hub._hf_api = None
