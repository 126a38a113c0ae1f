"""Fixtures of the Hub's tests: a loopback Hub, and a user whose processes import nothing but transformers and torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qhub.testing.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]
TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}

_LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

for call in json.loads(sys.argv[1]):
    model = None
    try:
        model = AutoModelForCausalLM.from_pretrained(**call)
        with torch.no_grad():
            answer = {"logits": model(torch.arange(1, 10)[None]).logits.tolist()}
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": kinds, "message": str(error), "loaded": model is not None}
    print("answer:" + json.dumps(answer), flush=True)
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(tokens=TOKENS) as server:
        yield server


@pytest.fixture
def alice(hub: HubServer, tmp_path: Path) -> Iterator[HubServer]:
    """The Hub, with this process logged in to it as alice."""
    with hub.activate(token="hf_alice", cache_dir=tmp_path / "home"):
        yield hub


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the pauses out of the client's retries, which are seconds long."""
    patient = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time", patient)
    monkeypatch.setattr("huggingface_hub.utils._http.time", patient)


@pytest.fixture(scope="session")
def plugin_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folders for PYTHONPATH under which another process finds the example plugin, whether it is installed or not."""
    announced = tmp_path_factory.mktemp("site")
    info = announced / "pow2_quant-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pow2-quant\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[qhub.plugins]\npow2 = pow2_quant\n")
    return os.pathsep.join([str(announced), str(ROOT / "examples" / "third_party_plugin")])


@pytest.fixture(scope="session")
def user(plugin_path: str) -> Callable[..., list[dict[str, Any]]]:
    """A function that makes ``from_pretrained`` calls in one fresh process and returns logits or the error of each."""

    def load(environment: dict[str, str], *calls: dict[str, Any]) -> list[dict[str, Any]]:
        path = os.pathsep.join(filter(None, [plugin_path, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, json.dumps(calls)],
            env={**os.environ, **environment, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
            timeout=120,
        )
        lines = [line.removeprefix("answer:") for line in done.stdout.splitlines() if line.startswith("answer:")]
        assert len(lines) == len(calls), done.stderr
        return [json.loads(line) for line in lines]

    return load
