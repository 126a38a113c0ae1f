"""Checks compressed-tensors checkpoints between qhub and the library of that name, both ways: the same weights.

The library compresses the weights of dense models under many schemes, and decompresses what qhub wrote for them; both
in processes of their own, qhub's importing transformers and nothing of qhub. The library multiplies in the scales'
dtype; here its own functions are given float32 scales, so that weights have to be equal bit for bit. Its forward
(through transformers, inputs rounded) is compared by logits. Run where qhub is installed; ``--peer``: the Python of an
environment with compressed-tensors::

    python benchmarks/interop_compressed_tensors.py MODEL [MODEL ...] --peer PYTHON --source FOLDER --out FILE

``--source``: checkpoints of other methods, of Llamas, which ``qhub convert`` takes over; the library has to decompress
their very weights.
Ends with an error when a weight differs, or the library misses a tensor or finds one too many.
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

# Both run in float32, with the same weights and rounded inputs: measured 6e-6, with logits of up to 4.
_LOGITS = 1e-4

_INT: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False}
_TOKENS: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
_MIXED: dict[str, Any] = {
    "rows": {"targets": ["re:.*(fc1|gate_proj|w1)$"],
             "weights": {**_INT, "num_bits": 8, "strategy": "channel"}, "input_activations": _TOKENS},
    "groups": {"targets": ["Linear"], "weights": {**_INT, "num_bits": 4, "group_size": 32, "strategy": "group"}},
}  # fmt: skip


def _packed(bits: int, **others: Any) -> dict[str, Any]:
    return {
        "targets": ["Linear"],
        "weights": {**_INT, "num_bits": bits, "strategy": "group", "group_size": 32, **others},
    }


SCHEMES: dict[str, dict[str, Any]] = {
    **{name: {name: ["Linear"]} for name in (
        "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP6A16", "MXFP8A16",
        "MXFP8",
    )},
    **{f"{bits} bits in 32": {"g": _packed(bits)} for bits in (2, 3, 4, 8)},
    **{f"{bits} bits in 32, asymmetric": {"g": _packed(bits, symmetric=False)} for bits in (2, 3, 4, 8)},
    "8 bits, rows": {"g": _packed(8, strategy="channel", group_size=None)},
    "4 bits, rows, asymmetric": {"g": _packed(4, strategy="channel", group_size=None, symmetric=False)},
    "int8, asymmetric weights and inputs": {"g": {
        "targets": ["Linear"],
        "weights": {**_INT, "num_bits": 8, "strategy": "channel", "symmetric": False},
        "input_activations": {**_TOKENS, "symmetric": False},
    }},
    "4 bits in bytes, int8 inputs": {"g": {**_packed(4), "input_activations": _TOKENS}},
    "float8 alone, blocks of 32 x 64": {"g": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]},
    }},
    "mixed": _MIXED,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--source", action="append", default=[], metavar="FOLDER", help="also take this over")
    parser.add_argument("--only", action="append", help="check these schemes alone")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.role:
        return _check(arguments)
    for folder, job in json.loads((arguments.work / "jobs.json").read_text(encoding="utf-8")).items():
        try:
            ROLES[arguments.role](job, arguments.work / folder)
        except Exception as error:  # told in the result; the other settings go on
            with (arguments.work / f"{folder}.failed").open("a", encoding="utf-8") as file:
                file.write(f"{arguments.role}: {type(error).__name__}: {error}\n")
    return None


# -- what runs in a process of its own --------------------------------------------------------------------------------


def _tokens() -> torch.Tensor:
    return torch.arange(3, 35)[None]


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(_tokens()).logits.float().contiguous()


def _write(job: dict[str, Any], folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = {"quant_method": "compressed-tensors", "config_groups": job["groups"]}
    made = AutoModelForCausalLM.from_pretrained(job["model"], quantization_config=config, dtype=job["dtype"])
    made.save_pretrained(folder)


def _read(job: dict[str, Any], folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    count = sum(hasattr(parameter, "quant_layout") for parameter in loaded.parameters())
    found = {"logits": _logits(loaded), "count": torch.tensor(count)}
    with tempfile.TemporaryDirectory() as scratch:
        loaded.dequantize().save_pretrained(scratch)
        found |= {f"weight.{name}": weight for name, weight in load_file(Path(scratch) / "model.safetensors").items()}
    save_file(found, folder.with_suffix(".own"))


def _convert(job: dict[str, Any], folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    command = [sys.executable, "-m", "qhub", "convert", job["model"], "--to", "compressed-tensors", "-o", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr[-500:])
    # The source's own weights, which the result has to hold.
    loaded = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    quantized = [name for name, parameter in loaded.named_parameters() if hasattr(parameter, "quant_layout")]
    loaded = loaded.dequantize()
    weights = {f"weight.{name}": loaded.get_parameter(name).detach().contiguous() for name in quantized}
    save_file(weights, folder.with_suffix(".source"))


def _write_peer(job: dict[str, Any], folder: Path) -> None:
    """Compress the matrices of a dense file one by one, as the library's compress_module does with a module's."""
    import shutil

    import compressed_tensors
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder.mkdir()
    source = Path(job["model"])
    dtype = getattr(torch, job["dtype"])
    config = QuantizationConfig(config_groups=job["groups"], quantization_status="compressed", ignore=["lm_head"])
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    formats = set()
    for name in [name for name in tensors if _is_linear(name, tensors[name])]:
        prefix = name.removesuffix(".weight")
        scheme = _scheme(config, prefix)
        scheme.format = scheme.format or _format(scheme)
        formats.add(scheme.format.value)
        state = _parameters(tensors.pop(name), scheme)
        done = BaseCompressor.get_value_from_registry(scheme.format.value).compress(state, scheme)
        tensors |= {f"{prefix}.{local}": entry.contiguous() for local, entry in done.items()}
    config.format = formats.pop() if len(formats) == 1 else "mixed-precision"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values |= {"dtype": job["dtype"], "quantization_config": {
        "version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {},
        **json.loads(config.model_dump_json()),
    }}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def _is_linear(name: str, tensor: torch.Tensor) -> bool:
    others = ("embed", "norm", "lm_head", "block_sparse_moe.gate")
    return name.endswith(".weight") and tensor.ndim == 2 and not any(other in name for other in others)


def _scheme(config: Any, prefix: str) -> Any:
    from compressed_tensors.utils.match import match_targets

    by_target = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    return by_target[match_targets(prefix, torch.nn.Linear(1, 1), by_target)[0]]


def _format(scheme: Any) -> Any:
    from compressed_tensors.compressors.format import infer_module_format

    return infer_module_format(torch.nn.Linear, scheme)


def _parameters(weight: torch.Tensor, scheme: Any) -> dict[str, torch.Tensor]:
    """Return weight, scales and zeros as the library's observers find them; inputs are taken to lie within +-4."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, state = scheme.weights, {"weight": weight}
    rows, columns = weight.shape
    if args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        groups = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width).transpose(1, 2)
        low, high = groups.amin((-2, -1)), groups.amax((-2, -1))
    elif args.group_size:
        groups = weight.reshape(rows, -1, args.group_size)
        low, high = groups.amin(-1), groups.amax(-1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    over = generate_gparam(weight.min(), weight.max()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, args, global_scale=over)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    if over is not None:
        state["weight_global_scale"] = over
    inputs = scheme.input_activations
    if inputs is not None and inputs.dynamic is not True:
        if inputs.dynamic == "local":
            state["input_global_scale"] = generate_gparam(torch.tensor(-4.0), torch.tensor(4.0))
        else:
            bound = torch.tensor([4.0], dtype=weight.dtype)
            state["input_scale"], state["input_zero_point"] = calculate_qparams(-bound, bound, inputs)
    return state


def _read_peer(job: dict[str, Any], folder: Path) -> None:
    import compressed_tensors
    import transformers
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM

    versions = {"compressed-tensors": compressed_tensors.__version__, "transformers": transformers.__version__}
    (folder.parent / "versions.json").write_text(json.dumps(versions), encoding="utf-8")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = QuantizationConfig.model_validate(values)
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for key in tensors:
        prefix = key.removesuffix(".weight_scale")
        if prefix != key:
            state = {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
            found[f"weight.{prefix}.weight"] = _decompressed(state, _scheme(config, prefix), config.format).contiguous()
    found["count"] = torch.tensor(len(found))
    # Fused experts transformers dequantizes in the dtype of their scales, or fails to; their inputs it never rounds.
    schemes = config.config_groups.values()
    plain = all(
        one.input_activations is None and one.weights.type == "int" and one.weights.symmetric for one in schemes
    )
    if "mixtral" not in job["model"] or (plain and job["dtype"] == "float32"):
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, **_ways(config), output_loading_info=True)
        wrong = {kind: sorted(keys) for kind, keys in info.items() if keys and kind != "error_msgs"}
        if wrong:
            raise ValueError(f"the library's own loading finds {str(wrong)[:500]}")
        found["logits"] = _logits(loaded)
        dense = "quantization_config" in _ways(config)
        found["comparable"] = torch.tensor(_comparable(loaded, config) and not (dense and job["dtype"] != "float32"))
    save_file(found, folder.with_suffix(".peer"))


def _comparable(model: Any, config: Any) -> bool:
    """Return whether the library's forward is what the config says, in float32.

    Small floats run in bfloat16; and of an input (tokens, features), as OPT's second layers have it, "token" makes one
    scale of all, as ``compute_dynamic_scales_and_zp`` leaves the first two dimensions alone.
    """
    inputs = [scheme.input_activations for scheme in config.config_groups.values()]
    flat = model.config.model_type == "opt" and any(one is not None and one.strategy == "token" for one in inputs)
    return model.dtype == torch.float32 and not flat


def _ways(config: Any) -> dict[str, Any]:
    """Return how transformers 5.23 with the library loads and runs the folder, for it cannot do so in every way.

    Packed zeros it takes for ones of another shape, unless weights are dequantized while loading, in the dtype of the
    scales; small floats it decompresses to bfloat16, whatever the model's dtype.
    """
    from transformers import CompressedTensorsConfig

    weights = [scheme.weights for scheme in config.config_groups.values()]
    small = any(args.type == "float" and (args.num_bits < 8 or args.group_size == 32) for args in weights)
    ways: dict[str, Any] = {"dtype": torch.bfloat16 if small else torch.float32}
    if config.format == "pack-quantized" and not all(args.symmetric for args in weights):
        ways["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return ways


def _decompressed(state: dict[str, torch.Tensor], scheme: Any, outer: str) -> torch.Tensor:
    """Return the float32 weight: the library's own unpacking, and its own formula on float32 scales."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    name = str(getattr(scheme.format or outer, "value", scheme.format or outer))
    compressor = BaseCompressor.get_value_from_registry(name)
    if name in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized"):
        packed = state["weight_packed"]
        wide = packed.shape[1] * 4 // 3 if "mxfp6" in name else packed.shape[1] * 2
        take = unpack_fp6_from_uint8 if "mxfp6" in name else unpack_fp4_from_uint8
        scale = compressor._decompress_scale(state["weight_scale"], torch.float32)
        return dequantize(
            take(packed, packed.shape[0], wide, torch.float32), scale, None, scheme.weights, torch.float32,
            state.get("weight_global_scale"),
        )  # fmt: skip
    if name == "mxfp8-quantized":
        scale = compressor._decompress_scale(state["weight_scale"]).float()
        return dequantize(state["weight"], scale, None, scheme.weights)
    return compressor.decompress({**state, "weight_scale": state["weight_scale"].float()}, scheme)["weight"]


ROLES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "convert": _convert, "read": _read, "read-peer": _read_peer, "write": _write, "write-peer": _write_peer,
}  # fmt: skip


# -- comparing --------------------------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> None:
    from importlib.metadata import version

    jobs: dict[str, dict[str, dict[str, Any]]] = {"write": {}, "write-peer": {}}
    for number, (name, groups) in enumerate(SCHEMES.items()):
        for model in arguments.models if name in (arguments.only or SCHEMES) else ():
            # Every dtype of scales comes up, and not with every scheme.
            dtype = ("bfloat16", "float32", "float16")[number % 3]
            for role, made in jobs.items():
                folder = f"{role}-{number}-{Path(model).name}"
                made[folder] = {"model": str(Path(model).resolve()), "scheme": name, "groups": groups, "dtype": dtype}
    jobs["convert"] = {
        f"convert-{Path(source).name}": {
            "model": str(Path(source).resolve()),
            "scheme": "taken over",
            "dtype": "float16",
        }
        for source in arguments.source
    }
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.keep or Path(scratch)
        work.mkdir(exist_ok=True)
        for role, made in jobs.items():
            _spawn(arguments, role, work, made)
        every = {folder: job for made in jobs.values() for folder, job in made.items()}
        for role in ("read", "read-peer"):
            _spawn(arguments, role, work, every)
        results: dict[str, dict[str, Any]] = {
            "written by qhub": {}, "written by compressed-tensors": {}, "taken over by qhub": {},
        }  # fmt: skip
        for role, side in zip(jobs, results, strict=True):
            for folder, job in jobs[role].items():
                label = f"{job['scheme']}, {Path(job['model']).name}, {job['dtype']}"
                results[side][label] = _compare(work / folder)
                print(role, label, json.dumps(results[side][label]), flush=True)
        peer = json.loads((work / "versions.json").read_text(encoding="utf-8"))
    own = {package: version(package) for package in ("qhub-core", "qhub-compressed-tensors", "torch", "transformers")}
    document = {
        **results,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "hardware": platform.machine(),
        "versions": {"qhub's processes": own, "the library's processes": peer},
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    wrong = [name for found in results.values() for name, one in found.items() if not one["as_promised"]]
    if wrong:
        raise SystemExit(f"failed, not the same weights, or logits too far apart: {wrong}")


def _spawn(arguments: argparse.Namespace, role: str, work: Path, jobs: dict[str, Any]) -> None:
    (work / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    python = arguments.peer if role.endswith("-peer") else sys.executable
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QHUB_AUTOLOAD": "0" if role.endswith("-peer") else "1",
                   "TORCHDYNAMO_DISABLE": "1"}  # fmt: skip
    command = [python, __file__, *arguments.models, "--role", role, "--work", str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{role} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _compare(folder: Path) -> dict[str, Any]:
    failed = Path(f"{folder}.failed")
    if failed.exists():
        return {"as_promised": False, "failed": failed.read_text(encoding="utf-8")}
    own, peer = load_file(folder.with_suffix(".own")), load_file(folder.with_suffix(".peer"))
    names = [name for name in peer if name.startswith("weight.")]
    source = folder.with_suffix(".source")
    if source.exists():
        wanted = load_file(source)
        if sorted(wanted) != sorted(names):
            return {"as_promised": False, "failed": "other weights are quantized than in the source"}
        own |= wanted
    different = [name for name in names if not torch.equal(own[name], peer[name])]
    result: dict[str, Any] = {"matrices": len(names), "different": len(different)}
    if different:
        result["worst"] = max(float((own[n] - peer[n]).abs().max() / peer[n].abs().max()) for n in different)
    good = bool(names) and not different and bool(torch.isfinite(own["logits"]).all())
    if "logits" in peer:
        result["logits"] = float((own["logits"] - peer["logits"]).abs().max())
        result["comparable_logits"] = bool(peer["comparable"])
        good = good and (result["logits"] <= _LOGITS or not result["comparable_logits"])
    return {"as_promised": good, **result}


if __name__ == "__main__":
    main()
