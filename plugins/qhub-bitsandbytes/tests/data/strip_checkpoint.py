"""Writes upstream.safetensors: layers of checkpoints that bitsandbytes wrote, with the weights it decodes them to.

    python strip_checkpoint.py OUTPUT CHECKPOINT:MODULE ...

A checkpoint is a folder with ``model.safetensors`` and ``reference.safetensors``; the latter holds
``dequant.<module>.weight``. A tensor is written as ``<checkpoint's name>/<entry>``, the weight as
``<name>/dequantized``.
"""

import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file


def main(output: Path, sources: list[str]) -> None:
    """Copy the entries of every ``CHECKPOINT:MODULE`` of ``sources`` to ``output``."""
    tensors = {}
    for source in sources:
        folder, _, module = source.rpartition(":")
        name = f"{Path(folder).name}.{module.rpartition('.')[2]}"
        with safe_open(Path(folder) / "model.safetensors", framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                if key.startswith(f"{module}.") and not key.endswith(".bias"):
                    tensors[f"{name}/{key.removeprefix(f'{module}.')}"] = opened.get_tensor(key)
        with safe_open(Path(folder) / "reference.safetensors", framework="pt") as opened:
            tensors[f"{name}/dequantized"] = opened.get_tensor(f"dequant.{module}.weight")
    save_file(tensors, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
