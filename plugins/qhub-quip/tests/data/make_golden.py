"""Writes golden.safetensors: layers that QuIP#'s own Python code rounds, packs and rotates back. Run with its sources.

    python make_golden.py QUIP-SHARP-FOLDER

Of QuIP# (github.com/Cornell-RelaxML/quip-sharp) only the codebooks and the rotations are used, which need no GPU once
the modules with CUDA code are replaced by empty ones. Keys: ``<case>.<entry>`` the entries of a layer;
``<case>.input`` the matrix (after the rotations, over Wscale) that QuIP# rounded; ``<case>.rounded`` what it rounded
it to; ``<case>.dequantized`` the weight. The header's metadata hold each case's settings as JSON, a digest of each
Hadamard matrix, and a digest of each codebook's table of 65,536 or 256 vectors.
"""

import hashlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

# codebook, N, K, whether inputs are divided, resid_scale_override, Wscale
CASES = {
    "2 bits": ("E8P12", 32, 128, False, -1, 1.0),
    "2 bits, 12": ("E8P12", 48, 192, True, -1, 0.75),
    "2 bits, 52": ("E8P12", 16, 832, False, -1, 1.0),
    "3 bits": ("E8P12RVQ3B", 16, 256, False, -1, 1.0),
    "3 bits, 20": ("E8P12RVQ3B", 80, 320, True, 2.25, 1.0),
    "4 bits": ("E8P12RVQ4B", 64, 64, False, -1, 1.0),
    "4 bits, 28": ("E8P12RVQ4B", 112, 448, False, 3.1, 1.0),
    "4 bits, 36": ("E8P12RVQ4B", 144, 64, True, -1, 0.5),
}
FILES = {
    "E8P12": ("latticee8_padded12", "E8P12_codebook", 7),
    "E8P12RVQ4B": ("latticee8_padded12_rvq4bit", "E8P12RVQ4B_codebook", 17),
    "E8P12RVQ3B": ("latticee8_padded12_rvq3bit", "E8P12RVQ3B_codebook", 18),
}
ORDERS = (12, 20, 28, 36, 52, 60, 108, 116, 124, 140, 156, 172)


def load(folder: Path) -> tuple[types.ModuleType, dict[str, torch.nn.Module]]:
    """Return QuIP#'s module of rotations and its codebooks by name."""
    for name in ("quiptools_cuda", "fast_hadamard_transform", "lib", "lib.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["lib"].utils = sys.modules["lib.utils"]
    sys.modules["lib.utils"].clean = lambda: None
    rotations = _module("lib.utils.matmul_had", folder / "lib" / "utils" / "matmul_had.py")
    codebooks = {}
    for name, (file, cls, _) in FILES.items():
        module = _module(f"lib.codebook.{file}", folder / "lib" / "codebook" / f"{file}.py")
        codebooks[name] = getattr(module, cls)()
    return rotations, codebooks


def _module(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def digest(values: torch.Tensor, dtype: torch.dtype) -> str:
    """Return a digest of ``values`` as ``dtype``."""
    return hashlib.sha256(values.to(dtype).contiguous().numpy().tobytes()).hexdigest()


def layer(rotations: types.ModuleType, codebook: torch.nn.Module, case: tuple, seed: int) -> dict[str, torch.Tensor]:
    """Return the entries of a random layer, and what it stands for."""
    name, n, k, rescaled, override, wscale = case
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, k, generator=generator) * codebook.opt_scale
    values, codes = zip(
        *(codebook.quantize(run, resid_scale_override=override) for run in matrix.reshape(n, k // 8, 8).unbind(1)),
        strict=True,
    )
    rounded, indices = torch.stack(values, 1).reshape(n, k), torch.stack(codes, 1).long()
    signs = (2.0 * torch.randint(0, 2, (n + k,), generator=generator) - 1) * (
        0.9 + 0.2 * torch.rand(n + k, generator=generator)
    )
    entries = {
        "Qidxs": codebook.maybe_pack_idxs(indices.clone()),
        "SU": signs[:k].half(),
        "SV": (signs[k:] * 0.02).half(),
        "Wscale": torch.tensor(wscale),
        "codebook_id": torch.tensor(FILES[name][2]),
    }
    # The steps of incoherence_process (lib/algo/quip.py), in float64.
    weight = rotations.matmul_hadU(rounded.double()) * entries["SU"].double()
    weight = rotations.matmul_hadU(weight.T.contiguous()).T * (entries["SV"].double() * wscale).unsqueeze(1)
    if rescaled:
        entries["scaleWH"] = (0.5 + torch.rand(k, generator=generator)).half()
        weight = weight / entries["scaleWH"].double()
    return {**entries, "input": matrix, "rounded": rounded, "dequantized": weight.float().contiguous()}


def main(folder: Path) -> None:
    """Write all cases."""
    torch.set_num_threads(1)
    rotations, codebooks = load(folder)
    tensors, settings = {}, {}
    for seed, (name, case) in enumerate(CASES.items()):
        tensors |= {f"{name}.{key}": value for key, value in layer(rotations, codebooks[case[0]], case, seed).items()}
        settings[name] = {"codebook": case[0], "rescale_WH": case[3], "resid_scale_override": case[4]}
    metadata = {
        "cases": json.dumps(settings),
        "hadamard": json.dumps(
            {order: digest(getattr(rotations, f"get_had{order}")(), torch.int8) for order in ORDERS}
        ),
        # Entries are multiples of a quarter.
        "tables": json.dumps(
            {
                "E8P": digest(codebooks["E8P12"].grid * 4, torch.int8),
                "E8": digest(codebooks["E8P12RVQ3B"].e81b_grid * 4, torch.int8),
            }
        ),
    }
    save_file(tensors, Path(__file__).with_name("golden.safetensors"), metadata=metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
