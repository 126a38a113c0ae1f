"""Compares torchao checkpoints both ways: written by transformers with torchao, and by qhub's plugin without it.

    python -m venv AO && AO/bin/pip install torch==2.13.0 transformers==5.23.0 torchao==0.18.0 accelerate
    AO/bin/python benchmarks/interop_torchao.py write WORK
    python benchmarks/interop_torchao.py here WORK
    AO/bin/python benchmarks/interop_torchao.py read WORK --out benchmarks/results/interop_torchao.json

The environment AO has no qhub. ``write``: torchao quantizes small random models with each config and saves them, with
the weights that it dequantizes and its logits. ``here``: qhub loads each, and quantizes the same model itself.
``read``: torchao loads what qhub wrote.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

IDS = torch.arange(5, 23).reshape(2, 9)
SIZES = {"vocab_size": 256, "hidden_size": 128, "num_attention_heads": 4}
# Those that torchao quantizes on a CPU, and those that it only loads there: (architecture, dtype, config).
INT4 = {
    "int4-tiles": ("llama", "bfloat16", {"group_size": 32, "int4_packing_format": "TILE_PACKED_TO_4D"}),
    "int4-plain": ("opt", "bfloat16", {"group_size": 64, "int4_packing_format": "PLAIN"}),
    "int4-words": ("llama", "bfloat16", {"group_size": 32, "int4_packing_format": "PLAIN_INT32"}),
}


def cases() -> dict[str, tuple[str, str, Any]]:
    """Return architecture, dtype and torchao's config of every case that it can make on a CPU."""
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        FqnToConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
        PerTensor,
    )

    asymmetric, no_clipping = MappingType.ASYMMETRIC, MappingType.SYMMETRIC_NO_CLIPPING_ERR
    int4 = IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    names = {"model.layers.0.mlp.down_proj": Int8WeightOnlyConfig(), "re:.*[qk]_proj": int4, "re:.*up_proj": None}
    return {
        "int8": ("llama", "bfloat16", Int8WeightOnlyConfig()),
        "int8-tensor": ("opt", "float32", Int8WeightOnlyConfig(granularity=PerTensor())),
        "int8-groups": ("mixtral", "bfloat16", Int8WeightOnlyConfig(granularity=PerGroup(32))),
        "int8-int8": ("llama", "bfloat16", Int8DynamicActivationInt8WeightConfig()),
        "int8-int8-asymmetric": (
            "opt",
            "bfloat16",
            Int8DynamicActivationInt8WeightConfig(act_mapping_type=asymmetric, reduce_range=True),
        ),
        "float8": ("mixtral", "bfloat16", Float8WeightOnlyConfig()),
        "float8-tensor": ("opt", "bfloat16", Float8WeightOnlyConfig(granularity=PerTensor())),
        "float8-e5m2": ("llama", "float16", Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2)),
        "int3-asymmetric": ("opt", "bfloat16", IntxWeightOnlyConfig(torch.int3, PerGroup(64), asymmetric)),
        "int5-no-clipping": (
            "llama",
            "bfloat16",
            IntxWeightOnlyConfig(torch.int5, PerGroup(32), no_clipping, scale_dtype=torch.float32),
        ),
        "int8-rows": ("llama", "float16", IntxWeightOnlyConfig()),
        "int8-int4": ("llama", "bfloat16", Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))),
        "int8-int4-asymmetric": (
            "opt",
            "float32",
            Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32), weight_mapping_type=asymmetric),
        ),
        "experts": ("mixtral", "bfloat16", FqnToConfig({"re:.*experts": Float8WeightOnlyConfig()})),
        "by-name": ("llama", "bfloat16", FqnToConfig({**names, "_default": Float8WeightOnlyConfig()})),
    }


def model_of(architecture: str) -> Any:
    """Return a small random model in float32."""
    import transformers

    torch.manual_seed(0)
    if architecture == "opt":
        config = transformers.OPTConfig(**SIZES, ffn_dim=256, num_hidden_layers=2, word_embed_proj_dim=128)
        return transformers.OPTForCausalLM(config)
    more = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 256}
    if architecture == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **more, num_local_experts=4))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more))


def logits_of(model: Any) -> torch.Tensor:
    """Return the logits for some tokens, in float32."""
    with torch.no_grad():
        return model.eval()(IDS).logits.float().contiguous()


def write(work: Path) -> None:
    """Save random models, and each case as torchao quantizes it."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    for architecture in ("llama", "opt", "mixtral"):
        model_of(architecture).save_pretrained(work / "dense" / architecture)
    for name, (architecture, dtype, config) in cases().items():
        model = AutoModelForCausalLM.from_pretrained(
            work / "dense" / architecture, dtype=dtype, quantization_config=TorchAoConfig(config)
        )
        model.save_pretrained(work / "torchao" / name)
        known = {"logits": logits_of(model)}
        for parameter, value in model.named_parameters():
            if hasattr(value, "qdata"):
                known[parameter] = value.dequantize().detach().clone().contiguous()
        save_file(known, work / f"{name}.safetensors")
        (work / f"{name}.json").write_text(json.dumps({"architecture": architecture, "dtype": dtype}))
        print(name, len(known) - 1)


def here(work: Path) -> None:
    """Load with qhub what torchao wrote, and let it write the same models."""
    from transformers import AutoModelForCausalLM

    rows = {}
    for file in sorted(work.glob("*.json")):
        name, said = file.stem, json.loads(file.read_text())
        if "architecture" not in said:
            continue
        theirs, ours = work / "torchao" / name, work / "qhub" / name
        known = load_file(work / f"{name}.safetensors")
        model = AutoModelForCausalLM.from_pretrained(theirs)
        logits = known.pop("logits")
        different = [
            key
            for key, value in known.items()
            if not torch.equal(model.get_parameter(key).dequantize(value.dtype), value)
        ]
        off = float((logits_of(model) - logits).abs().max())
        config = json.loads((theirs / "config.json").read_text())["quantization_config"]
        made = AutoModelForCausalLM.from_pretrained(
            work / "dense" / said["architecture"], dtype=said["dtype"], quantization_config=config
        )
        made.save_pretrained(ours)
        rows[name] = {
            **said,
            "weights": len(known),
            "weights that differ": different,
            "logits differ by": off,
            "largest logit": float(logits.abs().max()),
            "files": _same_files(theirs, ours),
        }
        print(name, rows[name])
    for name, (architecture, dtype, data) in INT4.items():
        config = {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": data}
        model = AutoModelForCausalLM.from_pretrained(
            work / "dense" / architecture,
            dtype=dtype,
            quantization_config={"quant_method": "torchao", "quant_type": {"default": config}},
        )
        model.save_pretrained(work / "qhub" / name)
        rows[name] = {"architecture": architecture, "dtype": dtype, "weights": len(model.hf_quantizer.plan)}
    if "torchao" in sys.modules:
        raise SystemExit("torchao was imported: this is to run without it")
    (work / "rows.json").write_text(json.dumps(rows))


def _same_files(theirs: Path, ours: Path) -> dict[str, bool]:
    """Return whether tensors, header and config that both wrote for one model are equal."""
    first, second = (_in_model(load_file(folder / "model.safetensors")) for folder in (theirs, ours))
    headers = []
    for folder in (theirs, ours):
        with safe_open(folder / "model.safetensors", framework="pt") as opened:
            said = opened.metadata()
        names = sorted(json.loads(said.pop("tensor_names")))
        headers.append({"names": names, **{k: json.loads(v) for k, v in said.items() if k != "format"}})
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (theirs, ours)]
    same = first.keys() == second.keys() and all(
        value.dtype == second[key].dtype and torch.equal(_bytes(value), _bytes(second[key]))
        for key, value in first.items()
    )
    return {"tensors": same, "header": headers[0] == headers[1], "config": configs[0] == configs[1]}


def _in_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # Mixtral's own name for what transformers calls mlp, which it also gives to stacked experts on the way out.
    return {key.replace(".block_sparse_moe.", ".mlp."): value for key, value in tensors.items()}


def _bytes(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def read(work: Path, out: Path) -> None:
    """Load with torchao what qhub wrote, and write the results of all three steps."""
    import torchao
    import transformers
    from transformers import AutoModelForCausalLM

    rows = json.loads((work / "rows.json").read_text())
    for name, row in rows.items():
        model, info = AutoModelForCausalLM.from_pretrained(work / "qhub" / name, output_loading_info=True)
        loaded = {key: value for key, value in model.named_parameters() if hasattr(value, "qdata")}
        row["read by torchao"] = {
            "weights": len(loaded),
            "classes": sorted({type(value.data).__name__ for value in loaded.values()}),
            "missing or unexpected": sum(len(info[key]) for key in ("missing_keys", "unexpected_keys")),
        }
        if (work / f"{name}.safetensors").exists():
            known = load_file(work / f"{name}.safetensors")
            logits = known.pop("logits")
            different = [key for key, value in known.items() if not torch.equal(loaded[key].dequantize(), value)]
            row["read by torchao"]["weights that differ"] = different
            row["read by torchao"]["logits differ by"] = float((logits_of(model) - logits).abs().max())
        print(name, row["read by torchao"])
    versions = {"torchao": torchao.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    result = {**versions, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        found = row["read by torchao"]
        wrong = row.get("weights that differ") or found.get("weights that differ") or found["missing or unexpected"]
        if wrong or found["weights"] != row["weights"] or not all(row.get("files", {}).values()):
            raise SystemExit(f"{name} differs: see above")


def main() -> None:
    """Run one of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["write", "here", "read"])
    parser.add_argument("work", type=Path, help="a folder for the models, a few megabytes")
    parser.add_argument("--out", type=Path, default=Path("interop_torchao.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.step == "write":
        write(given.work)
    elif given.step == "here":
        here(given.work)
    else:
        read(given.work, given.out)


if __name__ == "__main__":
    main()
