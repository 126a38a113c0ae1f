"""Compares whole checkpoints of qhub and of transformers with bitsandbytes, tensor by tensor and bit by bit.

Run ``write`` with each of two Pythons, one with qhub and this plugin, one with bitsandbytes and without qhub; then
``compare`` the two folders with either::

    python compare_checkpoints.py write OUTPUT MODEL ...
    python compare_checkpoints.py compare FIRST SECOND

Fused experts differ by design (transformers with bitsandbytes leaves them in 16 bits) and are passed over.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

NESTED = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
CONFIGS = {
    "int8": {"load_in_8bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {**NESTED, "bnb_4bit_compute_dtype": "bfloat16"},
    "nf4-nested-bfloat16": {**NESTED, "bnb_4bit_quant_storage": "bfloat16"},
}


def write(output: Path, models: list[str]) -> None:
    """Save every model under every config and dtype, quantized by whatever serves bitsandbytes in this process."""
    for model in models:
        for name, values in CONFIGS.items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                quantized = AutoModelForCausalLM.from_pretrained(
                    model, quantization_config=BitsAndBytesConfig(**values), dtype=dtype, device_map={"": "cpu"}
                )
                quantized.save_pretrained(output / f"{Path(model).name}-{name}-{str(dtype).removeprefix('torch.')}")


def compare(first: Path, second: Path) -> int:
    """Print what differs between the checkpoints of two folders; return how many tensors and configs do."""
    count = different = 0
    folders = sorted({folder.name for root in (first, second) for folder in root.iterdir()})
    for folder in folders:
        sides = [load_file(root / folder / "model.safetensors") for root in (first, second)]
        configs = [json.loads((root / folder / "config.json").read_text()) for root in (first, second)]
        bad = [key for key in sorted({*sides[0], *sides[1]}) if ".experts." not in key and not same(key, *sides)]
        if configs[0]["quantization_config"] != configs[1]["quantization_config"]:
            bad.append("config.json")
        count += len(sides[0])
        different += len(bad)
        print(f"{folder}: {len(sides[0])} tensors, {len(bad)} differ {bad[:3]}")
    print(f"{len(folders)} checkpoints, {count} tensors, {different} differ")
    return different


def same(key: str, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether both hold ``key`` with the same dtype, shape and bits."""
    if key not in first or key not in second:
        return False
    one, other = first[key], second[key]
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


if __name__ == "__main__":
    torch.set_num_threads(2)
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(compare(Path(sys.argv[2]), Path(sys.argv[3])) != 0)
