"""Makes this folder's data from checkpoints that compressed-tensors 0.20.0 wrote.

    python strip.py FIXTURES WORK OLDER BASE

FIXTURES: folders ``ct-*`` that llm-compressor 0.14 wrote, with ``reference.safetensors`` beside the weights. WORK: what
``benchmarks/interop_compressed_tensors.py base-llama1l-fp32 --keep WORK`` leaves, of a one-layer Llama. OLDER: what
older.py wrote, for the weight of ``self_attn.k_proj``. BASE: the dense model.

    layers.safetensors  ``<scheme>/<entry>`` of one layer under each scheme, ``<scheme>/dequant`` float32 as the library
                        decompresses it, ``dense``; header: configs by scheme, and dtypes of the dense weights
    tiny-llama-*        whole checkpoints, with logits of the library's forward
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
MODULE = "model.layers.0.self_attn.k_proj"
FIXTURES = {"w4a16": "ct-w4a16-packed", "w4a16-asym": "ct-w4a16-asym-packed", "nvfp4a16": "ct-nvfp4a16"}
WHOLE = {"FP8": "fp8-static", "mixed": "mixed"}


def main(fixtures: Path, work: Path, older: Path, base: Path) -> None:
    tensors = dict(load_file(older))
    configs, dtypes = {}, {}
    jobs = json.loads((work / "jobs.json").read_text())
    for folder, job in jobs.items():
        if not folder.startswith("write-peer"):
            continue
        weights, peer = load_file(work / folder / "model.safetensors"), load_file(work / f"{folder}.peer")
        scheme = job["scheme"]
        configs[scheme] = json.loads((work / folder / "config.json").read_text())["quantization_config"]
        dtypes[scheme] = job["dtype"]
        entries = {key: tensor for key, tensor in weights.items() if key.startswith(f"{MODULE}.")}
        tensors |= {f"{scheme}/{key.rpartition('.')[2]}": tensor for key, tensor in entries.items()}
        tensors[f"{scheme}/dequant"] = peer[f"weight.{MODULE}.weight"]
        if scheme in WHOLE:
            _copy(work / folder, WHOLE[scheme], {"logits": peer["logits"]})
    tensors["dense"] = load_file(base / "model.safetensors")[f"{MODULE}.weight"]
    for name, folder in FIXTURES.items():
        reference = load_file(fixtures / folder / "reference.safetensors")
        _copy(fixtures / folder, name, {key: reference[key] for key in ("input_ids", "logits_dequant")})
    header = {"configs": json.dumps(configs), "dtypes": json.dumps(dtypes)}
    save_file(tensors, HERE / "layers.safetensors", metadata=header)


def _copy(source: Path, name: str, reference: dict) -> None:
    target = HERE / f"tiny-llama-{name}"
    target.mkdir(exist_ok=True)
    shutil.copyfile(source / "model.safetensors", target / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    # In bfloat16 random models have ties that a key-value cache breaks one way or the other.
    (target / "config.json").write_text(json.dumps({**values, "dtype": "float32"}, indent=1) + "\n")
    save_file({key: tensor.contiguous() for key, tensor in reference.items()}, target / "reference.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
