"""What ``tests/training/test_sharding.py`` shows with two processes on a CPU, on two GPUs through NCCL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qhub.registry import registry

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "training" / "scale.py"
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
LAUNCH = ("accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
FSDP2 = (
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_reshard_after_forward", "true", "--fsdp_state_dict_type", "FULL_STATE_DICT"),
)


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    pytest.importorskip("peft")
    if "bitsandbytes" not in registry.list():
        pytest.skip("the plugin bitsandbytes is not installed")
    return tiny("llama")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    def start(launcher: tuple[str, ...], *jobs: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("scale") / "results.json"
        command = [sys.executable, "-m", *launcher, str(SCRIPT), str(out), str(model), json.dumps(NF4), *jobs]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-6000:]
        return {**json.loads(out.read_text()), "stderr": done.stderr}

    return start


@pytest.fixture(scope="module")
def alone(run: Callable[..., dict[str, Any]]) -> list[float]:
    return run((*TORCHRUN, "1"), "single")["single"]["losses"]


@pytest.fixture(scope="module")
def plain(run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run((*TORCHRUN, "2"), "ddp", "fsdp", "layouts", "refusals")


@pytest.fixture(scope="module")
def launched(run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run((*LAUNCH, "--num_processes", "2", *FSDP2), "prepared", "trainer")


@pytest.mark.parametrize("job", ["ddp", "fsdp"])
def test_losses_are_those_of_one_gpu(job: str, plain: dict[str, Any], alone: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(plain[job]["losses"]), torch.tensor(alone), rtol=1e-4, atol=0)


def test_codes_are_halved_moved_as_codes_and_gathered(plain: dict[str, Any]) -> None:
    found = plain["fsdp"]
    assert found["sharded"] and found["between_steps"] and found["gathered"] and plain["ddp"]["codes"]
    assert found["decoded"] == plain["ddp"]["decoded"] == 0
    for name, size in found["bytes"].items():
        assert found["whole"][name] / 2 <= size <= found["whole"][name] / 2 + 16 * 6, name


def test_layouts_are_sharded_exactly(plain: dict[str, Any]) -> None:
    assert plain["layouts"]["wrong"] == []


def test_refusals(plain: dict[str, Any]) -> None:
    assert all(found.startswith("UnsupportedError") for found in plain["refusals"].values()), plain["refusals"]


def test_accelerate_launch_with_fsdp2(launched: dict[str, Any], alone: list[float]) -> None:
    for job in ("prepared", "trainer"):
        found = launched[job]
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone), rtol=1e-3, atol=0)
        assert found["sharded"], job
    assert launched["prepared"]["gathered"]
    assert "adapter_model.safetensors" in launched["trainer"]["files"]
