"""Copies what the tests read of a checkpoint that QuIP#'s code packed.

    python strip_checkpoint.py CHECKPOINT

``CHECKPOINT``: config.json with ``quip_params``, model.safetensors, and reference.safetensors with ``input_ids``,
``logits_dequant`` (of a float32 model with the dequantized weights) and ``dequant.<weight>``. Of these the logits and
one layer are kept, in the folder ``tiny-llama``.
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

LAYER = "model.layers.0.self_attn.k_proj.weight"


def main(checkpoint: Path) -> None:
    """Write the folder ``tiny-llama`` beside this file."""
    target = Path(__file__).with_name("tiny-llama")
    target.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoint / name, target / name)
    reference = load_file(checkpoint / "reference.safetensors")
    kept = {name: reference[name] for name in ("input_ids", "logits_dequant", f"dequant.{LAYER}")}
    save_file(kept, target / "reference.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
