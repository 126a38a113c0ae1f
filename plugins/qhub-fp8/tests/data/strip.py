"""Makes this folder's ``tiny-llama-b64`` from a checkpoint that transformers 5.23 wrote (FineGrainedFP8Config, blocks
of 64x64, a one-layer Llama).

    python strip.py FOLDER

FOLDER is the checkpoint's, with ``reference.safetensors`` beside the weights: ``input_ids``, ``logits`` of a float32
model with the dequantized weights, and ``dequant.<parameter>``.
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "tiny-llama-b64"
LAYERS = ("self_attn.k_proj", "mlp.down_proj")


def main(folder: Path) -> None:
    HERE.mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / file, HERE / file)
    reference = load_file(folder / "reference.safetensors")
    kept = ("input_ids", "logits", *(f"dequant.model.layers.0.{layer}.weight" for layer in LAYERS))
    save_file({key: reference[key] for key in kept}, HERE / "reference.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
