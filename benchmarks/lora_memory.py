"""Peak memory of one LoRA step: bf16, bitsandbytes' NF4 with PEFT, and qhub's NF4 with PEFT, a fresh process per case.

    python benchmarks/lora_memory.py MODEL... --peer PYTHON --out benchmarks/results/lora_memory.json

``PYTHON`` is that of an environment with bitsandbytes and PEFT, and without qhub. On a CPU the peak is what the kernel
saw: after two steps (kernels are compiled, the optimizer has its state) freed pages are given back, the process's
high-water mark is reset, one more step runs, and the mark above the rest before it is the step's own. What rests is
counted exactly, from the tensors: weights, adapter, optimizer. On a GPU both are torch's own counts.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
RANK = 16
# PEFT's preparation casts what bitsandbytes leaves unquantized to float32, activations with it. Without it the rest
# stays in 16 bits, as it does in qhub's models whether they are prepared or not.
PEERS = ("bitsandbytes", "bitsandbytes, 16-bit rest")
HOST = ["torch", "transformers", "peft"]
# Freed blocks of 64 KiB and more go back to the kernel at once: the mark then counts what is in use, not what was.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def tensors_of(model: Any, optimizer: Any) -> int:
    """Return the bytes of everything that stays between steps; shared memory counts once."""
    found: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()

    for tensor in [*model.parameters(), *model.buffers()]:
        for part in getattr(tensor, "parts", {}).values() or [tensor]:
            add(part)
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            for value in vars(state).values():
                if isinstance(value, torch.Tensor):
                    add(value)
            state = getattr(state, "state2", None)
    for values in optimizer.state.values():
        for value in values.values():
            if isinstance(value, torch.Tensor):
                add(value)
    return sum(found.values())


def resident() -> dict[str, int]:
    """Return VmRSS and VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def measure(folder: str, method: str, checkpointing: bool, batch: int, length: int) -> dict[str, Any]:
    """Return the figures of one case; runs in a process of its own."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = {} if method == "bf16" else {"quantization_config": dict(NF4)}
    if method in PEERS:
        from transformers import BitsAndBytesConfig

        config = {"quantization_config": BitsAndBytesConfig(**{k: v for k, v in NF4.items() if k != "quant_method"})}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device, **config)
    served = [kind.__module__ for kind in type(getattr(model, "hf_quantizer", None)).__mro__]
    assert any(name.startswith("qhub.") for name in served) == (method == "qhub"), f"{method} was served by {served}"
    if method in ("bitsandbytes", "qhub"):
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    losses = [step(), step()]
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        losses.append(step())
        peak = torch.cuda.max_memory_allocated() - rest
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        rest = resident()["VmRSS"]
        losses.append(step())
        peak = resident()["VmHWM"] - rest
    held = tensors_of(model, optimizer)
    return {"held": held, "step": peak, "total": held + peak, "losses": losses}


def versions(python: str, names: list[str]) -> dict[str, str]:
    """Return the versions of packages as ``python`` sees them."""
    code = (
        "import sys, json; from importlib import metadata\nfound = {}\n"
        "for name in sys.argv[1:]:\n try: found[name] = metadata.version(name)\n"
        " except metadata.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def hardware() -> str:
    """Return the name of what was measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, one thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders of dense models, each maybe as FOLDER=BATCHxLENGTH")
    parser.add_argument("--peer", help="Python of the environment with bitsandbytes and PEFT")
    parser.add_argument("--runs", type=int, default=3, help="processes per case; the smallest peak counts")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        method, checkpointing, batch, length = arguments.case
        print(json.dumps(measure(arguments.models[0], method, checkpointing == "1", int(batch), int(length))))
        return
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": versions(sys.executable, [*HOST, "qhub-core", "qhub-bitsandbytes", "qhub-cpu"]),
        "peer": versions(arguments.peer, [*HOST, "bitsandbytes"]) if arguments.peer else {},
        "rank": RANK,
        "models": {},
    }
    for given in arguments.models:
        folder, _, shape = given.partition("=")
        batch, length = (int(number) for number in (shape or "4x256").split("x"))
        cases: dict[str, Any] = {}
        for method in ("bf16", *PEERS, "qhub"):
            python = arguments.peer if method in PEERS else sys.executable
            if python is None:
                continue
            for checkpointing in (False, True):
                command = [python, __file__, folder, "--case", method, str(int(checkpointing)), str(batch), str(length)]
                runs = []
                for _ in range(arguments.runs):
                    done = subprocess.run(
                        command, capture_output=True, text=True, env={**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
                    )
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    runs.append(json.loads(done.stdout.splitlines()[-1]))
                best = min(runs, key=lambda run: run["total"])
                best["runs"] = len(runs)
                best["spread"] = max(run["total"] for run in runs) - best["total"]
                cases[f"{method}{', checkpointing' if checkpointing else ''}"] = best
                print(f"{Path(folder).name} {method} {checkpointing}: {best}", flush=True)
        result["models"][Path(folder).name] = {"batch": batch, "length": length, "cases": cases}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
