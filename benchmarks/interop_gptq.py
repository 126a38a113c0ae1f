"""Checks GPTQ checkpoints between qhub and gptqmodel, both ways: the same weights, the same logits.

Each library writes checkpoints of one model in several settings; each reads what the other wrote, in a process of its
own, and dequantizes. gptqmodel computes ``scales * (q - zero)`` in float16, qhub in float32, so gptqmodel's weight has
to be qhub's, rounded once: at most 2^-11 of it away (2^-25 below float16's normal numbers). qhub's processes import
transformers and nothing of qhub. Run where qhub is installed; ``--peer``: the Python of an environment with gptqmodel::

    python benchmarks/interop_gptq.py MODEL --calibration FILE --peer PYTHON --out FILE

Ends with an error when a weight differs by more.
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_OWN: dict[str, dict[str, Any]] = {
    "2 bits, symmetric, v1": {"bits": 2},
    "3 bits, symmetric, v1": {"bits": 3},
    "4 bits, symmetric, v1": {"bits": 4},
    "8 bits, symmetric, v1": {"bits": 8},
    "4 bits, act-order": {"bits": 4, "desc_act": True},
    "3 bits in 32, act-order": {"bits": 3, "group_size": 32, "desc_act": True},
    "2 bits, asymmetric, v2": {"bits": 2, "sym": False, "format": "gptq_v2"},
    "3 bits, asymmetric, v2": {"bits": 3, "sym": False, "format": "gptq_v2"},
    "4 bits, asymmetric, v2": {"bits": 4, "sym": False, "format": "gptq_v2"},
    "8 bits, asymmetric, v2": {"bits": 8, "sym": False, "format": "gptq_v2"},
    "4 bits, asymmetric, act-order, v2": {"bits": 4, "sym": False, "format": "gptq_v2", "desc_act": True},
    "4 bits, dynamic": {
        "bits": 4,
        "dynamic": {r"+:.*\.down_proj": {"bits": 8, "group_size": 64}, r"-:.*\.o_proj": {}},
    },
}
_PEERS: dict[str, dict[str, Any]] = {
    "4 bits in 64, act-order": {"bits": 4, "group_size": 64, "desc_act": True},
    "3 bits in 32": {"bits": 3, "group_size": 32},
    # Its default order needs groups.
    "8 bits, whole rows": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "2 bits in 64": {"bits": 2, "group_size": 64},
    "4 bits in 32, static groups, act-order": {
        "bits": 4, "group_size": 32, "desc_act": True, "static_groups": True
    },
    "3 bits in 64, asymmetric, act-order": {"bits": 3, "group_size": 64, "sym": False, "desc_act": True},
    "2 bits in 32, asymmetric, v2": {"bits": 2, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "4 bits in 64, dynamic": {
        "bits": 4,
        "group_size": 64,
        "dynamic": {r"+:.*\.down_proj": {"bits": 8, "group_size": 32}, r"-:.*\.layers\.1\.mlp\..*": {}},
    },
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {"group_size": 128, "sym": True, "damp_percent": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", metavar="FILE")
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--only", action="append", help="check these settings alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.role:
        jobs = json.loads((arguments.work / "jobs.json").read_text(encoding="utf-8"))
        for folder, settings in jobs.items():
            try:
                ROLES[arguments.role](arguments.model, arguments.work, folder, settings)
            except Exception as error:  # told in the result; the other settings go on
                message = f"{arguments.role}: {type(error).__name__}: {error}"
                with (arguments.work / f"{folder}.failed").open("a", encoding="utf-8") as file:
                    file.write(message + "\n")
    else:
        _check(arguments)


# -- what runs in a process of its own --------------------------------------------------------------------------------


def _samples(work: Path) -> torch.Tensor:
    return load_file(work / "tokens.safetensors")["calibration"]


def _write(model: str, work: Path, folder: str, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    config = GPTQConfig(**settings, dataset=[sample[None] for sample in _samples(work)])
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config).save_pretrained(work / folder)
    # gptqmodel does not load a folder without one.
    AutoTokenizer.from_pretrained(model).save_pretrained(work / folder)


def _read(model: str, work: Path, folder: str, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(work / folder, dtype=torch.float32).eval()
    layouts = {name: p.quant_layout for name, p in loaded.named_parameters() if hasattr(p, "quant_layout")}
    found = {"logits": _logits(loaded, work)}
    loaded = loaded.dequantize()
    for name, layout in layouts.items():
        found[f"weight.{name}"] = loaded.get_parameter(name).detach().contiguous()
        found[f"bits.{name}"] = torch.tensor(layout.bits)
    save_file(found, work / f"{folder}.own")


def _write_peer(model: str, work: Path, folder: str, settings: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    data = [{"input_ids": s[None], "attention_mask": torch.ones_like(s)[None]} for s in _samples(work)]
    loaded = GPTQModel.load(model, QuantizeConfig(**settings, offload_to_disk=False), device="cpu")
    loaded.quantize(data)
    loaded.save(str(work / folder))


def _read_peer(model: str, work: Path, folder: str, settings: dict[str, Any]) -> None:
    import gptqmodel
    import transformers
    from gptqmodel import BACKEND, GPTQModel

    versions = {"gptqmodel": gptqmodel.__version__, "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    (work / "versions.json").write_text(json.dumps(versions), encoding="utf-8")
    quantized = GPTQModel.load(str(work / folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    loaded = quantized.model.eval()
    # Before anything runs: its layers may keep other forms of what they hold once they have.
    found = {}
    for name, layer in loaded.named_modules():
        if hasattr(layer, "qweight"):
            found[f"weight.{name}.weight"] = layer.dequantize_weight().detach().t().contiguous()
            found[f"bits.{name}.weight"] = torch.tensor(layer.bits)
    save_file({**found, "logits": _logits(loaded, work)}, work / f"{folder}.peer")


def _logits(model: Any, work: Path) -> torch.Tensor:
    with torch.no_grad():
        return model(load_file(work / "tokens.safetensors")["read"]).logits.float().contiguous()


ROLES: dict[str, Callable[[str, Path, str, dict[str, Any]], None]] = {
    "read": _read,
    "read-peer": _read_peer,
    "write": _write,
    "write-peer": _write_peer,
}


# -- comparing --------------------------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> None:
    from importlib.metadata import version

    from transformers import AutoTokenizer

    text = Path(arguments.calibration).read_text(encoding="utf-8")[:200_000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(arguments.model)(text, add_special_tokens=False)["input_ids"])
    chosen = {
        role: {name: {**_DEFAULTS, **values} for name, values in table.items() if name in (arguments.only or table)}
        for role, table in (("write", _OWN), ("write-peer", _PEERS))
    }
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        save_file(
            {"calibration": ids[: 8 * 128].reshape(8, 128), "read": ids[8 * 128 :][:64][None]},
            work / "tokens.safetensors",
        )
        names = _folders(chosen.values())
        results: dict[str, dict[str, Any]] = {}
        for role, settings in chosen.items():
            _spawn(arguments, role, work, {names[name]: values for name, values in settings.items()})
        for role in ("read", "read-peer"):
            _spawn(arguments, role, work, {names[name]: {} for settings in chosen.values() for name in settings})
        for role, settings in chosen.items():
            found = results.setdefault({"write": "written by qhub", "write-peer": "written by gptqmodel"}[role], {})
            for name, values in settings.items():
                found[name] = {"settings": values, **_compare(arguments.model, work, names[name])}
                print(role, name, json.dumps(found[name]), flush=True)
        peer = json.loads((work / "versions.json").read_text(encoding="utf-8"))
    own = {package: version(package) for package in ("qhub-core", "qhub-gptq", "torch", "transformers")}
    document = {
        "model": Path(arguments.model).name,
        "samples": "8 of 128 tokens",
        **results,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "hardware": platform.machine(),
        "versions": {"qhub's processes": own, "gptqmodel's processes": peer},
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    wrong = [name for found in results.values() for name, one in found.items() if not one["as_promised"]]
    if wrong:
        raise SystemExit(f"failed, not the same weights, or logits that are not finite: {wrong}")


def _folders(settings: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Return a folder's name for each setting's."""
    return {name: f"checkpoint-{number}" for number, name in enumerate(name for one in settings for name in one)}


def _spawn(arguments: argparse.Namespace, role: str, work: Path, jobs: dict[str, Any]) -> None:
    if not jobs:
        return
    (work / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    python = arguments.peer if role.endswith("-peer") else sys.executable
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if role.endswith("-peer"):
        # Its pool of threads asks for one more than it makes itself on a machine of one or two cores, and fails.
        # Its layers compile themselves for half a minute a checkpoint.
        environment |= {"QHUB_AUTOLOAD": "0", "GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}
    command = [python, __file__, arguments.model, "--role", role, "--work", str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{role} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _compare(model: str, work: Path, folder: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    failed = work / f"{folder}.failed"
    if failed.exists():
        return {"as_promised": False, "failed": failed.read_text(encoding="utf-8")}
    own, peer = load_file(work / f"{folder}.own"), load_file(work / f"{folder}.peer")
    names = sorted(name.removeprefix("weight.") for name in own if name.startswith("weight."))
    same_layers = sorted(own) == sorted(peer) and all(
        int(own[f"bits.{name}"]) == int(peer[f"bits.{name}"]) for name in names
    )
    worst, rounded, outside, dtypes = 0.0, 0, 0, set()
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    unquantized = _logits(dense, work)
    total = 0
    for name in names if same_layers else ():
        ours, theirs = own[f"weight.{name}"].double(), peer[f"weight.{name}"]
        dtypes.add(str(theirs.dtype).removeprefix("torch."))
        distance = (theirs.double() - ours).abs()
        outside += int((distance > torch.clamp(ours.abs() * 2.0**-11, min=2.0**-25)).sum())
        worst = max(worst, float((distance / ours.abs().clamp(min=2.0**-14)).max()))
        rounded += int((own[f"weight.{name}"].half() == theirs).sum())
        total += ours.numel()
        with torch.no_grad():
            dense.get_parameter(name).copy_(theirs.float())
    finite = bool(torch.isfinite(own["logits"]).all())
    return {
        "as_promised": same_layers and total > 0 and outside == 0 and finite,
        "layers": len(names),
        "layers_by_bits": {b: sum(int(own[f"bits.{n}"]) == b for n in names) for b in (2, 3, 4, 8)},
        "same_layers_and_bits": same_layers,
        "weights": total,
        "peer_dtype": sorted(dtypes),
        "outside_half_a_unit_of_float16": outside,
        "largest_relative_difference": worst,
        "largest_relative_difference_in_units_of_2^-11": worst * 2**11,
        "share_equal_to_ours_rounded_to_float16": rounded / max(total, 1),
        "logits_finite": finite,
        "logits_largest": float(own["logits"].abs().max()),
        "logits_from_dense_float32_with_peer_weights": float((own["logits"] - _logits(dense, work)).abs().max()),
        "logits_from_peer_forward_float16": float((own["logits"] - peer["logits"]).abs().max()),
        "logits_from_unquantized": float((own["logits"] - unquantized).abs().max()),
    }


if __name__ == "__main__":
    main()
