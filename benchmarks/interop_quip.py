"""Checks QuIP# checkpoints between qhub and QuIP#'s own code, both ways: the same weights, the same logits.

QuIP#'s Python code (its sources, from github.com/Cornell-RelaxML/quip-sharp; ``lib`` and ``quiptools``) rounds the
layers of tiny random models to its codebooks and packs them; a process that imports transformers and nothing of qhub
loads the result, and gives weights and logits. The other way, that process merges a random update into every layer and
saves; QuIP#'s CUDA kernel ``decompress_packed_e8p``, compiled for the CPU (it needs g++), and its Python rotations turn
the file into weights. Both compute in other orders in float32 (QuIP#'s side here in float64), so weights are compared
relative to the largest one, with 2e-6 as the bound; logits with those of a dense float32 model with QuIP#'s weights::

    python benchmarks/interop_quip.py QUIP-SHARP-FOLDER --out FILE

Ends with an error when a weight differs by more.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_BOUND = 2e-6
_TOKENS = torch.arange(1, 25).reshape(2, 12)
_LLAMA: dict[str, Any] = dict(hidden_size=128, intermediate_size=256, num_key_value_heads=2)
# Model, what differs from the tiny one, whether fused as in released checkpoints, quip_params.
_CASES: dict[str, tuple[str, dict[str, Any], bool, dict[str, Any]]] = {
    "2 bits": ("Llama", _LLAMA, False, {"codebook": "E8P12"}),
    "2 bits, fused": ("Llama", _LLAMA, True, {"codebook": "E8P12"}),
    "3 bits, fused": ("Llama", _LLAMA, True, {"codebook": "E8P12RVQ3B"}),
    "4 bits, inputs divided": ("Llama", _LLAMA, False, {"codebook": "E8P12RVQ4B", "rescale_WH": True}),
    "4 bits, another residual scale": (
        "Llama", _LLAMA, False, {"codebook": "E8P12RVQ4B", "resid_scale_override": 3.1}
    ),
    "2 bits, sizes of 12 and 28": (
        "Llama", dict(hidden_size=192, intermediate_size=448, num_key_value_heads=4), False, {"codebook": "E8P12"}
    ),
    "3 bits, sizes of 20 and 36": (
        "Llama", dict(hidden_size=320, intermediate_size=576, num_key_value_heads=4), False, {"codebook": "E8P12RVQ3B"}
    ),
    "2 bits, biases": (
        "OPT", dict(hidden_size=128, ffn_dim=256, word_embed_proj_dim=128), False, {"codebook": "E8P12"}
    ),
    "3 bits, experts": ("Mixtral", {**_LLAMA, "num_local_experts": 3}, False, {"codebook": "E8P12RVQ3B"}),
}  # fmt: skip
_FILES = {
    "E8P12": ("latticee8_padded12", "E8P12_codebook", 7),
    "E8P12RVQ4B": ("latticee8_padded12_rvq4bit", "E8P12RVQ4B_codebook", 17),
    "E8P12RVQ3B": ("latticee8_padded12_rvq3bit", "E8P12RVQ3B_codebook", 18),
}
_FUSED = {"q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")), "up_proj": ("upgate_proj", ("up_proj", "gate_proj"))}
# What CUDA has and g++ has not. One half-precision addition stands in assembler: it is exact for these values.
_HOST = r"""
#include <cstdint>
#include <cstring>
#define __global__
#define __restrict__
struct uint2 { uint32_t x, y; };
struct Dim { int x, y, z; };
static Dim threadIdx, blockIdx, gridDim;
static uint32_t add_as_half2(uint32_t x, uint32_t y) {
    _Float16 a[2], b[2]; std::memcpy(a, &x, 4); std::memcpy(b, &y, 4);
    a[0] += b[0]; a[1] += b[1]; std::memcpy(&x, a, 4); return x;
}
static uint32_t mask_lop3(uint32_t x, uint32_t m0, uint32_t m1) { return (x & m0) | m1; }
"""
_LOOP = r"""
extern "C" void decompress(uint32_t* out, const uint2* words, const uint32_t* table, int N, int K) {
    gridDim.x = 1;
    for (threadIdx.y = 0; threadIdx.y < 32; threadIdx.y++)
        for (threadIdx.x = 0; threadIdx.x < 32; threadIdx.x++)
            decompress_packed_e8p_kernel(out, words, table, N, K);
}
"""


class Upstream:
    """Is QuIP#'s code: codebooks, rotations, and the kernel that decodes 16-bit codes, built in ``work``."""

    def __init__(self, folder: Path, work: Path) -> None:
        import types

        for name in ("quiptools_cuda", "fast_hadamard_transform", "lib", "lib.utils"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["lib"].utils = sys.modules["lib.utils"]  # type: ignore[attr-defined]
        sys.modules["lib.utils"].clean = lambda: None  # type: ignore[attr-defined]
        self.rotations = _module("lib.utils.matmul_had", folder / "lib/utils/matmul_had.py")
        self.codebooks = {
            name: getattr(_module(f"lib.codebook.{file}", folder / f"lib/codebook/{file}.py"), cls)()
            for name, (file, cls, _) in _FILES.items()
        }
        source = (folder / "quiptools/quiptools_e8p_gemv.cu").read_text(encoding="utf-8")
        constants = "\n".join(re.findall(r"^#define (?:BASE_OFFSET|XMASK|WMASK) .*$", source, re.MULTILINE))
        begin = source.rindex("__global__", 0, source.index("decompress_packed_e8p_kernel("))
        kernel = source[begin : source.index("__host__", begin)]
        (work / "decode.cpp").write_text(f"{_HOST}\n{constants}\n{kernel}\n{_LOOP}", encoding="utf-8")
        command = ["g++", "-O2", "-shared", "-fPIC", "-o", str(work / "decode.so"), str(work / "decode.cpp")]
        subprocess.run(command, check=True)
        self._decode = ctypes.CDLL(str(work / "decode.so")).decompress

    def decode(self, name: str, words: torch.Tensor, n: int, k: int, override: float) -> torch.Tensor:
        """Return the stored matrix (N, K) float64 of the entry Qidxs."""
        codebook = self.codebooks[name]
        first = self._sixteen(words[:, : k // 32], n, k, codebook)
        if name == "E8P12":
            return first
        scale = override if override > 0 else codebook.opt_resid_scale
        rest = words[:, k // 32 :].contiguous()
        if name == "E8P12RVQ4B":
            return first + self._sixteen(rest, n, k, codebook) / scale
        # decompress_e81b_packed: one byte after the other.
        index = rest.view(torch.uint8).reshape(n, k // 8).long()
        return first + codebook.e81b_grid[index].reshape(n, k).double() / scale

    def _sixteen(self, words: torch.Tensor, n: int, k: int, codebook: Any) -> torch.Tensor:
        words, out = words.contiguous(), torch.zeros(n, k, dtype=torch.float16)
        table = codebook.grid_packed_abs.contiguous()
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (out, words, table)]
        self._decode(*pointers, n, k)
        return out.double()

    def weight(self, entries: dict[str, torch.Tensor], params: dict[str, Any]) -> torch.Tensor:
        """Return the weight (N, K) of a layer's ``entries`` by ``incoherence_process`` (lib/algo/quip.py)."""
        n, k = entries["SV"].numel(), entries["SU"].numel()
        stored = self.decode(params["codebook"], entries["Qidxs"], n, k, params["resid_scale_override"])
        left = self.rotations.matmul_hadU(stored) * entries["SU"].double()
        scale = entries["SV"].double() * entries["Wscale"].double()
        weight = self.rotations.matmul_hadU(left.T.contiguous()).T * scale.unsqueeze(1)
        return weight / entries["scaleWH"].double() if "scaleWH" in entries else weight

    def quantize(self, weight: torch.Tensor, params: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
        """Return a layer's entries, as ``quantize`` of lib/algo/quip.py makes them, but rounded to nearest."""
        codebook, generator = self.codebooks[params["codebook"]], torch.Generator().manual_seed(seed)
        n, k = weight.shape
        entries: dict[str, torch.Tensor] = {}
        if params["rescale_WH"]:
            entries["scaleWH"] = (0.5 + torch.rand(k, generator=generator)).half()
            weight = weight * entries["scaleWH"].float()
        su, sv = (2.0 * torch.randint(0, 2, (size,), generator=generator) - 1 for size in (k, n))
        rotated = self.rotations.matmul_hadUt((weight.T * sv).contiguous()).T * su
        rotated = self.rotations.matmul_hadUt(rotated.contiguous())
        scale = rotated.square().mean().sqrt() / codebook.opt_scale
        runs = (rotated / scale).reshape(n, k // 8, 8).unbind(1)
        codes = [codebook.quantize(r, resid_scale_override=params["resid_scale_override"])[1] for r in runs]
        return {
            "Qidxs": codebook.maybe_pack_idxs(torch.stack(codes, 1).long()),
            "SU": su.half(),
            "SV": (sv * scale).half(),
            "Wscale": torch.ones(()),
            "codebook_id": torch.tensor(_FILES[params["codebook"]][2]),
            **entries,
        }


def _module(name: str, path: Path) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _write(upstream: Upstream, folder: Path, case: tuple[str, dict[str, Any], bool, dict[str, Any]]) -> None:
    """Write a checkpoint of QuIP#'s into ``folder``, and the dense model of its weights into ``folder``.dense."""
    import transformers

    kind, changes, fused, given = case
    codebook = upstream.codebooks[given["codebook"]]
    params = {"lora_rank": 0, "rescale_WH": False, "codebook_version": codebook.version, "codesz": 8,
              "idx_dtype": "torch.int64", "packsz": codebook.packsz, "resid_scale_override": -1,
              "model_version": 1, **given}  # fmt: skip
    torch.manual_seed(0)
    shared = dict(vocab_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    config = getattr(transformers, f"{kind}Config")(**{**shared, **changes})
    dense = folder.with_suffix(".dense")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(dense)
    plain = load_file(dense / "model.safetensors")
    stored = dict(plain)
    for seed, key in enumerate(sorted(plain)):
        name = key.removesuffix(".weight").rpartition(".")[2]
        chosen = plain[key].ndim == 2 and not re.search(r"embed|lm_head|gate\.weight$", key) and key in stored
        if not chosen or (fused and name in ("k_proj", "v_proj", "gate_proj")):
            continue
        whole, members = _FUSED[name] if fused and name in _FUSED else (name, (name,))
        keys = [key.replace(name, member) for member in members]
        pieces = [plain[one] for one in keys]
        scales = [float(piece.square().mean().sqrt()) if len(members) > 1 else 1.0 for piece in pieces]
        stacked = torch.cat([piece / scale for piece, scale in zip(pieces, scales, strict=True)])
        entries = upstream.quantize(stacked, params, seed)
        weight = upstream.weight(entries, params)
        prefix = key.removesuffix(f"{name}.weight") + whole
        stored |= {f"{prefix}.{local}": value for local, value in entries.items()}
        if len(members) > 1:
            stored[f"{prefix}.fuse_scales"] = torch.tensor(scales)
        rows = weight.split([piece.shape[0] for piece in pieces])
        for one, piece, scale in zip(keys, rows, scales, strict=True):
            plain[one] = (piece * torch.tensor(scale).double()).float().contiguous()
            del stored[one]
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**values, "quip_params": params}), encoding="utf-8")


def _read(folder: Path) -> None:
    """Write what qhub makes of ``folder``: weights and logits; then update every weight and save that too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = {"logits": model(_TOKENS).logits}
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            if not hasattr(weight, "quant_layout"):
                continue
            # Fused experts are one parameter.
            found[f"before.{name}"] = weight.dequantize(torch.float32).contiguous()
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(found[f"before.{name}"] + 0.2 * found[f"before.{name}"].std() * noise)
            found[f"after.{name}"] = weight.dequantize(torch.float32).contiguous()
        model.save_pretrained(folder.with_suffix(".updated"))
    save_file(found, folder.with_suffix(".found"))


def _compare(upstream: Upstream, folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    found = load_file(folder.with_suffix(".found"))
    result: dict[str, Any] = {}
    for what, files in (("before", folder), ("after", folder.with_suffix(".updated"))):
        tensors = load_file(files / "model.safetensors")
        params = json.loads((files / "config.json").read_text(encoding="utf-8"))["quip_params"]
        theirs = {}
        for key in (key for key in tensors if key.endswith(".Qidxs")):
            prefix = key.removesuffix(".Qidxs")
            entries = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
            theirs[prefix] = upstream.weight(entries, params)
        worst = count = 0
        for name, ours in ((k.removeprefix(f"{what}."), v) for k, v in found.items() if k.startswith(f"{what}.")):
            expected = _expected(name, theirs)
            worst = max(worst, float((ours - expected).abs().max() / expected.abs().max()))
            count += ours.numel()
        kind = {"before": "read by qhub", "after": "updated and written by qhub"}[what]
        result[kind] = {"matrices": len(theirs), "weights": count, "largest_relative_difference": worst}
    dense = AutoModelForCausalLM.from_pretrained(folder.with_suffix(".dense"), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = dense(_TOKENS).logits
    result["logits_from_dense_float32_with_quips_weights"] = float((found["logits"] - expected).abs().max())
    result["logits_largest"] = float(expected.abs().max())
    result["as_promised"] = all(
        one["largest_relative_difference"] <= _BOUND for one in result.values() if type(one) is dict
    )
    return result


def _expected(name: str, theirs: dict[str, torch.Tensor]) -> torch.Tensor:
    prefix = name.removesuffix(".weight")
    if prefix in theirs:
        return theirs[prefix]
    # Mixtral's experts: w1 and w3 on top of each other, w2.
    layer = re.search(r"layers\.(\d+)\.", name)
    assert layer is not None
    members = ("w1", "w3") if "gate_up" in name else ("w2",)
    own = {key: value for key, value in theirs.items() if f"layers.{layer[1]}." in key and "experts" in key}
    experts = sorted({key.rpartition(".")[0] for key in own})
    return torch.stack([torch.cat([own[f"{expert}.{member}"] for member in members]) for expert in experts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="?")
    parser.add_argument("--only", action="append", help="check these settings alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.read:
        _read(arguments.read)
        return
    from importlib.metadata import version

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        upstream = Upstream(arguments.sources, Path(scratch))
        for number, (name, case) in enumerate(_CASES.items()):
            if name not in (arguments.only or _CASES):
                continue
            folder = Path(scratch) / f"checkpoint-{number}"
            _write(upstream, folder, case)
            command = [sys.executable, __file__, "--read", str(folder)]
            done = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
            results[name] = {"model": case[0], "fused": case[2], "settings": case[3], **_compare(upstream, folder)}
            print(name, json.dumps(results[name]), flush=True)
    document = {
        "cases": results,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "hardware": platform.machine(),
        "versions": {package: version(package) for package in ("qhub-core", "qhub-quip", "torch", "transformers")},
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    wrong = [name for name, one in results.items() if not one["as_promised"]]
    if wrong:
        raise SystemExit(f"failed, not the same weights: {wrong}")


if __name__ == "__main__":
    main()
