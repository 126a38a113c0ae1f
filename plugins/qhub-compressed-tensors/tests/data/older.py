"""Writes two layers as compressed-tensors 0.11.0 packs them: what later versions gave up, and files still have.

    python older.py WEIGHT OUT

WEIGHT: a safetensors file with ``weight`` (N, K) float32. Run where compressed-tensors 0.11.0 is installed.

    older/3 bits     ``32 // 3`` codes in each word
    older/act-order  ``weight_g_idx`` gives each input feature a group
"""

import sys

import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file


def main(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    compressor, made = PackedQuantizationCompressor(), {}
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    g_idx = torch.empty(weight.shape[1], dtype=torch.int32)
    g_idx[order] = torch.arange(weight.shape[1], dtype=torch.int32) // 32
    for name, bits, index in (("3 bits", 3, None), ("act-order", 4, g_idx)):
        args = QuantizationArgs(
            num_bits=bits, group_size=32, symmetric=True, actorder=None if index is None else "group"
        )
        columns = torch.arange(weight.shape[1]) if index is None else torch.argsort(index, stable=True)
        groups = weight[:, columns].reshape(weight.shape[0], -1, 32)
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        done = compressor.compress_weight(weight, scale, args, g_idx=index)
        done |= {"weight_scale": scale}
        if index is not None:
            done["weight_g_idx"] = index
        done["dequant"] = compressor.decompress_weight(done, args)
        made |= {f"older/{name}/{entry}": tensor.contiguous() for entry, tensor in done.items()}
    return made


if __name__ == "__main__":
    save_file(main(load_file(sys.argv[1])["weight"]), sys.argv[2])
