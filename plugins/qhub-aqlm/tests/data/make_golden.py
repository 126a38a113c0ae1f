"""Writes golden.safetensors: AQLM layers, and what aqlm dequantizes them to. Run where aqlm 1.1.7 is installed.

    python make_golden.py

Keys: ``<case>.codes``, ``.codebooks``, ``.scales`` the entries of ``QuantizedLinear.state_dict()``;
``<case>.dequantized`` what ``aqlm.utils._dequantize_weight`` returns for them in float32. The header's metadata hold
each case's settings as JSON. The codes are random: this is about the format, not about a model.
"""

import json
from pathlib import Path

import torch
from aqlm import QuantizedLinear
from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data
from safetensors.torch import save_file

# out_features, in_features, out_group, in_group, codebooks, bits, dtype
CASES = {
    "1x16": (24, 32, 1, 2, 1, 16, torch.float16),
    "2x8": (16, 64, 1, 8, 2, 8, torch.float16),
    "8x8-g32": (8, 64, 1, 32, 8, 8, torch.bfloat16),
    "1x12": (16, 32, 1, 4, 1, 12, torch.float16),
    "3x5": (12, 30, 1, 6, 3, 5, torch.float32),
    "2x8-rows": (16, 32, 4, 4, 2, 8, torch.float16),
}


def main() -> None:
    tensors, settings = {}, {}
    for seed, (name, (n, k, out_group, in_group, books, bits, dtype)) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)
        layer = QuantizedLinear(k, n, in_group, out_group, books, bits, bias=False, dtype=dtype)
        codes = torch.randint(0, 2**bits, layer.codes.shape, generator=generator)
        codes.view(-1)[:2] = torch.tensor([2**bits - 1, 2 ** (bits - 1)])
        layer.codes.data = pack_int_data(codes.clone(), bits)
        layer.codebooks.data = (torch.randn(layer.codebooks.shape, generator=generator) * 0.1).to(dtype)
        layer.scales.data = (torch.rand(layer.scales.shape, generator=generator) + 0.5).to(dtype)
        state = {key: value.detach().clone() for key, value in layer.state_dict().items()}
        dense = _dequantize_weight(
            unpack_int_data(state["codes"], bits), state["codebooks"].float(), state["scales"].float()
        )
        tensors.update({f"{name}.{key}": value for key, value in state.items()})
        tensors[f"{name}.dequantized"] = dense
        settings[name] = {
            "in_group_size": in_group,
            "out_group_size": out_group,
            "num_codebooks": books,
            "nbits_per_codebook": bits,
        }
    save_file(tensors, Path(__file__).with_name("golden.safetensors"), metadata={"cases": json.dumps(settings)})


if __name__ == "__main__":
    main()
