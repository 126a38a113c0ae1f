"""Makes this folder's data from checkpoints that gptqmodel 7.7.0 and autoawq 0.2.9 packed (one-layer Llamas).

    python strip.py FOLDER

FOLDER holds one folder a checkpoint, with ``reference.safetensors`` beside the weights: ``input_ids``,
``logits_dequant`` of a float32 model with the dequantized weights, and ``dequant.<parameter>``: for gemm what gptqmodel
dequantizes a layer to (float16 values), for the others the (q - zero) * scale that autoawq's packer was given.
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
CASES = {
    "tiny-llama-gemm-g32": "awq-gemm-g32",
    "tiny-llama-gemv-g64": "awq-autoawq-gemv-g64",
    "tiny-llama-gemv_fast-g128": "awq-autoawq-gemv_fast-g128",
}
LAYERS = ("self_attn.k_proj", "mlp.down_proj")


def main(folder: Path) -> None:
    for name, case in CASES.items():
        source, target = folder / case, HERE / name
        target.mkdir(exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(source / file, target / file)
        reference = load_file(source / "reference.safetensors")
        kept = ("input_ids", "logits_dequant", *(f"dequant.model.layers.0.{layer}.weight" for layer in LAYERS))
        save_file({key: reference[key] for key in kept}, target / "reference.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
