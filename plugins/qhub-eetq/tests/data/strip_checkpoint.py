"""Copies what the tests read of a checkpoint that EETQ wrote, and of the model that it was made from.

    python strip_checkpoint.py CHECKPOINT BASE

``CHECKPOINT``: config.json, model.safetensors, and reference.safetensors with ``input_ids``, ``logits_dequant`` (of a
float32 model with the dequantized weights) and ``dequant.<weight>``. ``BASE``: the folder of the dense model.
``reference.safetensors`` is written with the logits, one dequantized layer, and the float16 weights of two layers as
``source.<weight>``.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SOURCES = ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight")


def main(checkpoint: Path, base: Path) -> None:
    """Write the folder ``tiny-llama`` beside this file."""
    target = Path(__file__).with_name("tiny-llama")
    target.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoint / name, target / name)
    reference, dense = load_file(checkpoint / "reference.safetensors"), load_file(base / "model.safetensors")
    kept = {name: reference[name] for name in ("input_ids", "logits_dequant", f"dequant.{SOURCES[0]}")}
    kept |= {f"source.{name}": dense[name].to(torch.float16) for name in SOURCES}
    save_file(kept, target / "reference.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
