"""Times GPTQ on one core: gptqmodel and qhub, on the same samples, with the same settings, in the same environment.

Every run is a process of its own, pinned to one core with one thread; the sides take turns within a round, so that
whatever else the machine does meets all of them. Timed is quantizing alone: from a dense model in memory and tokens to
packed layers; imports and loading come before. What was made is saved and its perplexity read, so that a side cannot be
fast by doing less. Needs an environment that has both gptqmodel and qhub (with qhub-gptq)::

    python benchmarks/peers_gptq.py MODEL --calibration FILE --text FILE --samples 64 --rounds 3 --out FILE

gptqmodel runs without qhub's door (``QHUB_AUTOLOAD=0``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_SHARED: dict[str, Any] = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "damp_percent": 0.05}
_BOTH: dict[str, Any] = {**_SHARED, "act_group_aware": True, "true_sequential": True}

# gptqmodel computes in the checkpoint's dtype where nothing is said, qhub in float32 on a CPU.
SIDES: dict[str, dict[str, Any]] = {
    "gptqmodel": {},
    "gptqmodel, float32": {"dtype": "float32"},
    "qhub, mse=0.0": {"mse": 0.0},
    "qhub": {},
}
# By the wall, and of the process: the second leaves out what others on the machine take.
CLOCKS = ("seconds", "cpu_seconds")
PAIRS = [(peer, ours) for ours in ("qhub, mse=0.0", "qhub") for peer in ("gptqmodel", "gptqmodel, float32")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", metavar="FILE")
    parser.add_argument("--text", metavar="FILE", help="what perplexity is read on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="run these sides alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", nargs=4, metavar=("SIDE", "TOKENS", "SAVED", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        _run(arguments.model, *arguments.run)
    else:
        _measure(arguments)


# -- one run, in a process of its own ---------------------------------------------------------------------------------


def _run(folder: str, side: str, tokens: str, saved: str, result: str) -> None:
    torch.set_num_threads(1)
    samples = load_file(tokens)["input_ids"]
    times = (_peer if side.startswith("gptqmodel") else _ours)(folder, samples, SIDES[side], saved)
    Path(result).write_text(json.dumps({"seconds": times[0], "cpu_seconds": times[1]}), encoding="utf-8")


def _pin() -> None:
    """Put every thread there is on one core; later ones inherit it. gptqmodel's pool does not start with one core."""
    core = {max(os.sched_getaffinity(0))}
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), core)


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - started[0], time.process_time() - started[1]


def _peer(folder: str, samples: torch.Tensor, options: dict[str, Any], saved: str) -> tuple[float, float]:
    from gptqmodel import GPTQModel, QuantizeConfig

    # In memory, as qhub does it here: its offloading of finished layers to the disk would only cost time.
    config = QuantizeConfig(**_BOTH, offload_to_disk=False)
    dtype = {"dtype": getattr(torch, options["dtype"])} if "dtype" in options else {}
    model = GPTQModel.load(folder, config, device="cpu", **dtype)
    data = [{"input_ids": s[None], "attention_mask": torch.ones_like(s)[None]} for s in samples]
    _pin()
    started = _clock()
    model.quantize(data)
    times = _since(started)
    model.save(saved)
    return times


def _ours(folder: str, samples: torch.Tensor, options: dict[str, Any], saved: str) -> tuple[float, float]:
    from transformers import AutoModelForCausalLM, GPTQConfig
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    quantizer, times = AUTO_QUANTIZER_MAPPING["gptq"], []
    after_loading = quantizer.postprocess_model

    def timed(self: Any, model: Any, **kwargs: Any) -> Any:
        _pin()
        started = _clock()
        result = after_loading(self, model, **kwargs)
        times.append(_since(started))
        return result

    quantizer.postprocess_model = timed
    config = GPTQConfig(**_BOTH, **options, dataset=[s[None] for s in samples])
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(saved)
    return times[0]


# -- all runs ---------------------------------------------------------------------------------------------------------


def _measure(arguments: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from qhub.calibration.data import windows

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(Path(arguments.calibration).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    sides = arguments.only or list(SIDES)
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    perplexities: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.safetensors"
        save_file({"input_ids": torch.cat(windows(ids, arguments.samples, arguments.length))}, tokens)
        few = Path(scratch) / "few.safetensors"
        save_file({"input_ids": torch.cat(windows(ids, 2, arguments.length))}, few)
        for side in sides:
            # gptqmodel compiles its packing the first time; the disk's cache is warm for all.
            _spawn(arguments.model, side, few, Path(scratch) / "few", Path(scratch) / "few.json")
        for number in range(arguments.rounds):
            for side in random.Random(number).sample(sides, len(sides)):
                saved = Path(scratch) / side.replace(" ", "_")
                runs[side].append(_spawn(arguments.model, side, tokens, saved, Path(scratch) / "result.json"))
                print(number, side, runs[side][-1], flush=True)
                if arguments.text and side not in perplexities:
                    perplexities[side] = _perplexity(str(saved), arguments.model, arguments.text)
                    print(side, "perplexity", perplexities[side], flush=True)
        if arguments.text:
            perplexities["unquantized"] = _perplexity(arguments.model, arguments.model, arguments.text)
    _write(arguments, runs, perplexities)


def _spawn(model: str, side: str, tokens: Path, saved: Path, result: Path) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if side.startswith("gptqmodel"):
        # Its pool of threads asks for one more than it makes itself on a machine of one or two cores, and fails.
        environment |= {"QHUB_AUTOLOAD": "0", "GPTQMODEL_CPU_WORKERS": "2"}
    command = [sys.executable, __file__, model, "--run", side, str(tokens), str(saved), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def _perplexity(folder: str, tokenizer: str, text: str) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qhub.evaluate import perplexity, windows_of

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(model, "hf_quantizer"):
        model = model.dequantize()
    tokens = windows_of(AutoTokenizer.from_pretrained(tokenizer), Path(text).read_text(encoding="utf-8"))
    return perplexity(model, tokens).value


def _write(
    arguments: argparse.Namespace, runs: dict[str, list[dict[str, float]]], perplexities: dict[str, float]
) -> None:
    pairs = [(peer, ours) for peer, ours in PAIRS if {peer, ours} <= set(runs)]
    medians = {clock: {side: _median(found, clock) for side, found in runs.items()} for clock in CLOCKS}
    known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {"models": {}}
    known["models"][Path(arguments.model).name] = {
        "samples": arguments.samples,
        "length": arguments.length,
        "runs": runs,
        "medians": medians,
        "ratio_of_medians": {
            clock: {f"{peer} / {ours}": found[peer] / found[ours] for peer, ours in pairs}
            for clock, found in medians.items()
        },
        "perplexity": perplexities,
    }
    known["settings"] = _BOTH
    known["date"] = datetime.date.today().isoformat()
    known["python"] = platform.python_version()
    known["hardware"] = {"cpu": _cpu(), "cores_used": 1, "threads": 1, "load_average": os.getloadavg()}
    packages = ("qhub-core", "qhub-gptq", "gptqmodel", "torch", "transformers")
    known["versions"] = {package: version(package) for package in packages}
    arguments.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _median(runs: list[dict[str, float]], clock: str) -> float:
    return statistics.median(run[clock] for run in runs)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{facts.get('model name')} (family {facts.get('cpu family')}, model {facts.get('model')})"


if __name__ == "__main__":
    main()
