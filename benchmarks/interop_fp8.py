"""Checks float8 checkpoints between qhub and their own libraries, both ways: the same weights, bit for bit.

``fp8`` against transformers itself (``QHUB_NATIVE=fp8``, which dequantizes on a CPU; to have it quantize there, its
check for a GPU is taken out), ``inc`` against Intel Neural Compressor (``--peer``: the Python of an environment with
neural-compressor-pt; its QDQ mode, the only one on a CPU). qhub's processes import transformers and nothing of qhub.
Run where qhub is installed::

    python benchmarks/interop_fp8.py MODEL [MODEL ...] --peer PYTHON --out FILE

Ends with an error when a weight differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# What transformers reads of what qhub wrote. Blocks that do not divide a weight it refuses to dequantize.
_FP8_OWN: dict[str, dict[str, Any]] = {
    "blocks of 32x32": {"weight_block_size": [32, 32]},
    "blocks of 16x32, powers of two": {"weight_block_size": [16, 32], "scale_fmt": "ue8m0"},
    "one scale": {"weight_block_size": None},
    "one scale, static inputs": {"weight_block_size": None, "activation_scheme": "static"},
}
_FP8_PEER: dict[str, dict[str, Any]] = {
    "blocks of 64x32": {"weight_block_size": [64, 32]},
    "blocks of 16x16, powers of two": {"weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
    "one scale": {"weight_block_size": None},
}
_INC: dict[str, dict[str, Any]] = {
    "maxabs_pow2": {"scale_method": "maxabs_pow2", "hp_dtype": "fp32"},
    "maxabs_arbitrary": {"scale_method": "maxabs_arbitrary", "hp_dtype": "bf16"},
    "unit_scale, E5M2": {"scale_method": "unit_scale", "fp8_config": "E5M2", "hp_dtype": "fp32"},
    "weights by channel": {
        "scale_method": "act_maxabs_pow2_weights_pcs_maxabs_pow2", "hp_dtype": "bf16", "scale_format": "const"
    },
}  # fmt: skip
_INC_COMMON = {
    "use_qdq": True,
    "blocklist": {"names": ["lm_head"], "types": []},
    "allowlist": {"names": [], "types": ["Linear"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--peer-path", metavar="FOLDER", help="put before the peer's own packages")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.role:
        for folder, settings in arguments.jobs.items():
            try:
                ROLES[arguments.role](arguments.models[0], Path(folder), settings)
            except Exception as error:  # told in the result; the other settings go on
                message = f"{arguments.role}: {type(error).__name__}: {error}"
                Path(folder).with_suffix(".failed").write_text(message, encoding="utf-8")
    else:
        _check(arguments)


# -- what runs in a process of its own --------------------------------------------------------------------------------


def _ids() -> torch.Tensor:
    return torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(0))


def _keep(model: Any, folder: Path, name: str) -> None:
    """Write the dense weights of a model, and its logits, beside the checkpoint."""
    with torch.no_grad():
        logits = model(_ids()).logits.float()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = {f"weight.{name}.weight": model.get_submodule(name).weight.detach().float().clone() for name in linear}
    save_file({"logits": logits, **found}, folder.with_suffix(name))


def _fp8_write(model: str, folder: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    config = FineGrainedFP8Config(**settings, dataset=[{"input_ids": one[None]} for one in _ids()])
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
    loaded.save_pretrained(folder)


def _read(model: str, folder: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Intel's files do not say which method they are of.
    config["quantization_config"].setdefault("quant_method", "inc")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = loaded(_ids()).logits.float()
    _keep(loaded.dequantize(), folder, ".own")
    save_file({"logits": logits}, folder.with_suffix(".running"))


def _fp8_write_native(model: str, folder: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    FineGrainedFP8HfQuantizer.validate_environment = lambda self, *args, **kwargs: None
    config = FineGrainedFP8Config(**settings)
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
    loaded.save_pretrained(folder)


def _fp8_read_native(model: str, folder: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    _keep(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), folder, ".peer")


def _inc_write(model: str, folder: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    # GAUDI3: the range of E4M3 that the library uses on a CPU.
    values = {"quant_method": "inc", "device_for_scales": "GAUDI3", **_INC_COMMON, **settings}
    config = values | {"dataset": [{"input_ids": one[None]} for one in _ids()]}
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32).save_pretrained(folder)


def _inc_config(folder: Path, settings: dict[str, Any]) -> Any:
    from neural_compressor.torch.quantization import FP8Config

    return FP8Config(**_INC_COMMON, **settings, dump_stats_path=str(folder.with_suffix(".stats")))


def _inc_dense(model: Any, folder: Path) -> None:
    """Keep what the library's own layers dequantize their weights to."""
    with torch.no_grad():
        found = {"logits": model(_ids()).logits.float()}
    for name, layer in model.named_modules():
        if type(layer).__name__ == "PatchedLinear":
            scale = torch.as_tensor(layer.dequant_weights.scale).float()
            found[f"weight.{name}.weight"] = (layer.weight.float() * scale).t().contiguous()
    save_file(found, folder.with_suffix(".peer"))


def _inc_write_peer(model: str, folder: Path, settings: dict[str, Any]) -> None:
    from neural_compressor.torch.quantization import convert, finalize_calibration, prepare, save
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if settings["hp_dtype"] == "bf16" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    loaded = prepare(loaded, _inc_config(folder, settings))
    with torch.no_grad():
        loaded(_ids())
    finalize_calibration(loaded)
    loaded = convert(loaded)
    _inc_dense(loaded, folder)
    save(loaded, str(folder))


def _inc_read_peer(model: str, folder: Path, settings: dict[str, Any]) -> None:
    from neural_compressor.torch.quantization import load

    _inc_dense(load(str(folder), format="huggingface", device="cpu"), folder)


ROLES: dict[str, Callable[[str, Path, dict[str, Any]], None]] = {
    "fp8-write": _fp8_write,
    "read": _read,
    "fp8-write-native": _fp8_write_native,
    "fp8-read-native": _fp8_read_native,
    "inc-write": _inc_write,
    "inc-write-peer": _inc_write_peer,
    "inc-read-peer": _inc_read_peer,
}


# -- the comparison ---------------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace, role: str, model: str, jobs: dict[Path, dict[str, Any]]) -> None:
    """Run one role for the ``jobs`` that nothing has failed for: one process for all, Intel's library one for each."""
    left = {str(folder): settings for folder, settings in jobs.items() if not folder.with_suffix(".failed").exists()}
    python, environment = sys.executable, dict(os.environ)
    batches = [left] if left else []
    if role.endswith("native"):
        environment["QHUB_NATIVE"] = "fp8"
    if role.endswith("peer"):
        python, batches = arguments.peer, [{folder: settings} for folder, settings in left.items()]
        environment["PYTHONPATH"] = arguments.peer_path or ""
    for batch in batches:
        command = [python, str(Path(__file__).resolve()), model, "--role", role, "--jobs", json.dumps(batch)]
        where = Path(next(iter(batch))).parent
        done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{role}: {done.stderr[-2000:]}")


def _compare(folder: Path, running: bool) -> dict[str, Any]:
    own, peer = load_file(folder.with_suffix(".own")), load_file(folder.with_suffix(".peer"))
    logits = load_file(folder.with_suffix(".running"))["logits"] if running else own["logits"]
    names = [name for name in peer if name.startswith("weight.") and name in own]
    different = [name for name in names if not torch.equal(own[name], peer[name])]
    return {
        "weights": len(names),
        "different": different,
        "logits": float((logits - peer["logits"]).norm() / peer["logits"].norm()),
    }


def _check(arguments: argparse.Namespace) -> None:
    results: dict[str, Any] = {}
    plans = [
        ("fp8: qhub writes, transformers reads", _FP8_OWN, ("fp8-write", "fp8-read-native", "read"), False),
        ("fp8: transformers writes, qhub reads", _FP8_PEER, ("fp8-write-native", "fp8-read-native", "read"), False),
    ]
    if arguments.peer:
        plans += [
            ("inc: qhub writes, INC reads", _INC, ("inc-write", "inc-read-peer", "read"), True),
            ("inc: INC writes, qhub reads", _INC, ("inc-write-peer", "read"), True),
        ]
    failed = False
    with tempfile.TemporaryDirectory() as work:
        for number, model in enumerate(arguments.models):
            for place, (title, cases, roles, running) in enumerate(plans):
                folders = {Path(work) / f"{number}-{place}-{i}": one for i, one in enumerate(cases.values())}
                for role in roles:
                    _run(arguments, role, model, folders)
                for label, folder in zip(cases, folders, strict=True):
                    problem = folder.with_suffix(".failed")
                    found = {"failed": problem.read_text()} if problem.exists() else _compare(folder, running)
                    failed = failed or "failed" in found or bool(found["different"]) or not found["weights"]
                    results.setdefault(Path(model).name, {}).setdefault(title, {})[label] = found
                    print(Path(model).name, title, label, found, flush=True)
    if arguments.out:
        import transformers

        about = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": platform.machine(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        arguments.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit("weights differ, or a checkpoint could not be read")


if __name__ == "__main__":
    main()
