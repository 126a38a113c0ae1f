"""From folder to folder, one block in memory at a time: killed it goes on, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qhub.errors import CheckpointError, UnsupportedError
from qhub.integrations.transformers.streaming import quantize_folder

PROGRAM = """
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("watching", {conftest!r})
watching = importlib.util.module_from_spec(spec)
sys.modules["watching"] = watching
spec.loader.exec_module(watching)
from qhub.registry import registry
from qhub.integrations.transformers import install
registry.register(watching.Watched(), "watched")
install()
from qhub.integrations.transformers.streaming import quantize_folder
source, out, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
import torch
torch.set_num_threads(1)
done = quantize_folder(source, watching.WatchedConfig(bits=4, equalize=True, options=settings), out)
print(json.dumps(dict(resumed=done.resumed, errors=[layer.error for layer in done.report.layers])))
"""


def start(source, out, settings, *launcher):
    program = PROGRAM.format(conftest=str(Path(__file__).with_name("conftest.py")))
    file = out.parent / "program.py"
    file.write_text(program)
    command = [sys.executable, *launcher, str(file), str(source), str(out), json.dumps(settings)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.strip().splitlines()[-1])


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        # What it took is in there.
        if file.name != "calibration.json"
    }


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral"])
def test_the_result_is_that_of_a_model_in_memory(watched, tiny, tokens, tmp_path, architecture):
    folder, out = tiny(architecture), tmp_path / "out"
    settings = {"data": tokens(count=8, length=64), "min_tokens": 1}
    config = watched.config(equalize=True, options=settings)
    streamed = quantize_folder(str(folder), config, out)
    assert not (tmp_path / "out.partial").exists()
    direct = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([tokens()[0]])
    assert torch.equal(direct(ids).logits, loaded(ids).logits)
    assert [one.name for one in streamed.report.layers] == [one.name for one in direct.hf_quantizer.calibration.layers]
    assert set(json.loads((out / "calibration.json").read_text())) == {"layers", "seconds", "warnings", "processes"}
    # Nothing dense is left in memory.
    blocks = streamed.model.get_submodule("transformer.h" if architecture == "gpt2" else "model.layers")
    assert all(parameter.device.type == "meta" for parameter in blocks.parameters())


def test_another_run_does_not_go_on_there(watched, tiny, tokens, tmp_path):
    out = tmp_path / "out"
    config = watched.config(options={"data": tokens()})
    quantize_folder(str(tiny("llama")), config, out, keep_work=True)
    with pytest.raises(CheckpointError, match=r"another run \(it differs in .*samples"):
        quantize_folder(str(tiny("llama")), watched.config(options={"data": tokens(seed=1)}), out)
    with pytest.raises(CheckpointError, match=r"differs in config"):
        quantize_folder(str(tiny("llama")), watched.config(bits=5, options={"data": tokens()}), out)
    assert quantize_folder(str(tiny("llama")), config, out, keep_work=True).resumed == 2
    other = watched.config(bits=5, options={"data": tokens()})
    assert quantize_folder(str(tiny("llama")), other, out, anew=True).resumed == 0


def test_a_method_that_needs_no_data_is_sent_to_from_pretrained(watched, tiny, tokens, tmp_path):
    with pytest.raises(UnsupportedError, match="needs no data"):
        quantize_folder(str(tiny("llama")), watched.config(statistics=()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def killed(process, work: Path, blocks: int, delay: float) -> bool:
    """Kill the process ``delay`` seconds after ``blocks`` blocks are finished; False if it ended before."""
    while process.poll() is None:
        if len(list(work.glob("*.safetensors"))) >= blocks:
            time.sleep(delay)
            break
        time.sleep(0.02)
    if process.poll() is not None or not work.exists():
        return False
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return True


@pytest.mark.parametrize("wanted", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_it_goes_on_and_ends_with_the_same_bytes(doclm, tmp_path, wanted):
    generator = random.Random(0)
    settings = {"data": torch.randint(3, 8000, (4, 64), generator=torch.Generator().manual_seed(0)).tolist()}
    finish(start(doclm, tmp_path / "whole", settings))
    out, kills, resumed = tmp_path / "killed", 0, 0
    work = tmp_path / "killed.partial"
    while kills < wanted:
        there = len(list(work.glob("*.safetensors")))
        process = start(doclm, out, settings)
        # Now and then before the first block is finished; the moment within a block is random.
        if killed(process, work, max(there, generator.randint(0, 4) if wanted > 1 else 2), 0.3 * generator.random()):
            kills += 1
            continue
        # It got through: begin anew with the kills that are left.
        resumed = max(resumed, finish(process)["resumed"])
        assert digests(out) == digests(tmp_path / "whole")
        for file in out.iterdir():
            file.unlink()
        out.rmdir()
    resumed = max(resumed, finish(start(doclm, out, settings))["resumed"])
    assert digests(out) == digests(tmp_path / "whole")
    assert resumed > 0


def test_ctrl_c_says_how_to_go_on_and_going_on_ends_with_the_same_bytes(doclm, tmp_path):
    from typer.testing import CliRunner

    from qhub.cli.app import app

    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps(f"The {number} files of a folder are listed by ls. " * 30) + "\n" for number in range(8))
    )
    out, work = tmp_path / "out", tmp_path / "out.partial"
    command = ["quantize", str(doclm), "-m", "gptq", "--bits", "4", "--dataset", str(texts), "--length", "64", "-o"]
    # A shell that starts pytest in the background makes it ignore the signal, which its children would inherit.
    process = subprocess.Popen(
        [sys.executable, "-m", "qhub", *command, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list(work.glob("*.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert f"interrupted: finished blocks are kept in {work}; the same command goes on from there" in said
    assert not out.exists()
    finished = len(list(work.glob("*.safetensors")))
    assert 1 <= finished < 4
    resumed = CliRunner().invoke(app, [*command, str(out)])
    assert resumed.exit_code == 0 and f"going on with what {work} holds" in resumed.output
    assert not work.exists()
    assert CliRunner().invoke(app, [*command, str(tmp_path / "whole")]).exit_code == 0
    assert digests(out) == digests(tmp_path / "whole")


def test_two_processes_give_the_result_of_one(watched, tiny, tokens, tmp_path):
    settings = {"data": tokens(count=8, length=48), "device": "cpu", "batch_size": 2}
    one = finish(start(tiny("llama"), tmp_path / "one", settings))
    # With --cpu accelerate starts one process, unless there is mpirun; its launcher for GPUs starts two, with gloo.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    process = start(tiny("llama"), tmp_path / "two", settings, *launcher)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    report = json.loads((tmp_path / "two" / "calibration.json").read_text())
    two = report["layers"]
    assert report["processes"] == 2
    assert len(two) == len(one["errors"])
    # Sums in another order: float32 rounding, which may tip a code here and there.
    for a, b in zip(one["errors"], two, strict=True):
        assert b["error"] == pytest.approx(a, rel=0.02)
        assert b["tokens"] == 8 * 48
    ids = torch.tensor([tokens()[0]])
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("one", "two"))
    assert float((first - second).detach().norm() / first.norm()) < 0.02


def test_scales_folded_outside_the_blocks_are_kept(watched, tiny, tokens, tmp_path):
    # The output head reads the last norm, which lies in no block and takes the head's input scales.
    settings = {"data": tokens(count=8, length=64)}
    config = watched.config(equalize=True, modules_to_not_convert=[], options=settings)
    direct = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config)
    before = AutoModelForCausalLM.from_pretrained(tiny("llama")).model.norm.weight
    assert not torch.equal(direct.model.norm.weight, before)
    quantize_folder(str(tiny("llama")), config, tmp_path / "out", keep_work=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokens()[0]])
    with torch.no_grad():
        assert torch.equal(direct(ids).logits, loaded(ids).logits)
    # All is in the journal: going on with it gives the same.
    assert quantize_folder(str(tiny("llama")), config, tmp_path / "out").resumed == 3
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(direct(ids).logits, resumed(ids).logits)


def test_a_repository_streams(watched, tiny, tokens, tmp_path):
    from qhub.testing.hub_server import HubServer

    config = watched.config(options={"data": tokens()})
    with HubServer(tokens={"hf_test": "me"}) as hub, hub.activate(token="hf_test", cache_dir=tmp_path / "cache"):
        AutoModelForCausalLM.from_pretrained(tiny("llama")).push_to_hub("me/dense")
        quantize_folder("me/dense", config, tmp_path / "out")
    direct = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config)
    ids = torch.tensor([tokens()[0]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(direct(ids).logits, loaded(ids).logits)
