"""Two processes on one quantized model: DistributedDataParallel, FSDP2, and FSDP2 as accelerate prepares it."""

from __future__ import annotations

import importlib.util
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

ROOT = Path(__file__).resolve().parents[2]
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    pytest.importorskip("peft")
    if "bitsandbytes" not in registry.list():
        pytest.skip("the plugin bitsandbytes is not installed")
    return tiny("llama")


def launch(out: Path, model: Path, *jobs: str) -> dict[str, Any]:
    """Return the results of ``scale.py`` in two processes that talk through gloo.

    ``accelerate launch`` starts several processes on a CPU only through MPI; it sets the same variables as torchrun.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(Path(__file__).with_name("scale.py")), str(out), str(model), json.dumps(NF4), *jobs),
    ]
    # The reference needs no compiling, which each process would do anew.
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "QHUB_KERNEL": "reference"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **settings}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(out.read_text()), "stderr": done.stderr}


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("scale") / "results.json"
    return launch(out, model, "ddp", "fsdp", "trainer", "layouts", "refusals", "prepared")


@pytest.fixture(scope="module")
def alone(model: Path) -> list[float]:
    """The losses of one process on the whole batches."""
    spec = importlib.util.spec_from_file_location("scale", Path(__file__).with_name("scale.py"))
    assert spec is not None and spec.loader is not None
    scale = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scale)
    one = scale.adapted(str(model), NF4)
    return scale.train(one, scale.optimizer_of(one), 0, 1)


@pytest.mark.parametrize("job", ["ddp", "fsdp", "prepared"])
def test_losses_are_those_of_one_process(job: str, results: dict[str, Any], alone: list[float]) -> None:
    # Gradients are summed in another order: float32 rounding of some hundred terms, through three steps of AdamW.
    torch.testing.assert_close(torch.tensor(results[job]["losses"]), torch.tensor(alone), rtol=2e-5, atol=0)
    assert alone[-1] < alone[0]


def test_each_process_holds_half_of_the_bytes(results: dict[str, Any]) -> None:
    found = results["fsdp"]
    assert found["sharded"] and found["between_steps"]
    assert found["bytes"].keys() == found["whole"].keys()
    for name, size in found["bytes"].items():
        # Each part begins at a multiple of 16 bytes, and so do the pieces.
        assert found["whole"][name] / 2 <= size <= found["whole"][name] / 2 + 16 * 6, name


def test_nothing_is_dequantized_to_be_moved(results: dict[str, Any]) -> None:
    assert results["fsdp"]["decoded"] == results["ddp"]["decoded"] == 0


def test_state_dictionary_gathers_the_codes(results: dict[str, Any]) -> None:
    assert results["fsdp"]["gathered"] and results["prepared"]["gathered"]
    assert results["fsdp"]["adapter"]


def test_one_process_does_not_save_its_piece_of_the_base(results: dict[str, Any]) -> None:
    assert "is sharded by FSDP" in results["fsdp"]["save"]


def test_trainer_under_two_processes(results: dict[str, Any], alone: list[float]) -> None:
    # Trainer logs losses with five digits or less.
    torch.testing.assert_close(torch.tensor(results["trainer"]["losses"]), torch.tensor(alone), rtol=1e-4, atol=0)
    assert "adapter_model.safetensors" in results["trainer"]["files"]


def test_ddp_starts_from_the_codes_of_the_first_process(results: dict[str, Any]) -> None:
    assert results["ddp"]["kind"] == "DistributedDataParallel"
    assert results["ddp"]["codes"]


def test_accelerate_shards_and_broadcasts_no_float_weight(results: dict[str, Any]) -> None:
    assert results["prepared"]["sharded"]
    assert results["prepared"]["kind"].startswith("FSDP")
    assert "cpu_ram_efficient_loading is turned off" in results["stderr"]


def test_layouts_are_sharded_exactly(results: dict[str, Any]) -> None:
    assert results["layouts"]["count"] >= 22
    assert results["layouts"]["wrong"] == []


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        ("pickle", "save the adapter"),
        ("compute", "full_tensor"),
        ("write", "gather the weight first"),
        ("columns", "dimension 0 only"),
        ("fsdp1", "fsdp_version: 2"),
    ],
)
def test_what_cannot_be_done_says_so(attempt: str, words: str, results: dict[str, Any]) -> None:
    assert results["refusals"][attempt].startswith("UnsupportedError")
    assert words in results["refusals"][attempt]
