"""Writes golden.safetensors: small weights, what torchao 0.18 makes of them, and what it says and computes of that.

    python make_golden.py golden.safetensors [gpu.safetensors]

Needs torchao and a CPU; ``gpu.safetensors``: the output of this script run on a machine with a CUDA GPU, whose cases
(tinygemm's tiles, float8 with rounded inputs, which torchao has no CPU code for) are taken over.
"""

import json
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchao.core.config import config_to_dict
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.workflows import (
    Int4ChooseQParamsAlgorithm,
    Int4PackingFormat,
    IntxChooseQParamsAlgorithm,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TILES = Int4PackingFormat.TILE_PACKED_TO_4D
ASYMMETRIC, NO_CLIPPING = MappingType.ASYMMETRIC, MappingType.SYMMETRIC_NO_CLIPPING_ERR

CPU = {
    "int8-row-bf16": (BF16, Int8WeightOnlyConfig()),
    "int8-tensor-f32": (F32, Int8WeightOnlyConfig(granularity=PerTensor())),
    "int8-group-f16": (F16, Int8WeightOnlyConfig(granularity=PerGroup(32))),
    "int8-columns-bf16": (BF16, Int8WeightOnlyConfig(granularity=PerRow(dim=0))),
    "int8-dynamic-bf16": (BF16, Int8DynamicActivationInt8WeightConfig()),
    "int8-dynamic-asym-reduced": (
        BF16,
        Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC, reduce_range=True),
    ),
    "int8-dynamic-tensor": (F32, Int8DynamicActivationInt8WeightConfig(granularity=PerTensor())),
    "intx1-group": (BF16, IntxWeightOnlyConfig(torch.int1, PerGroup(16))),
    "intx2-hqq": (
        BF16,
        IntxWeightOnlyConfig(
            torch.int2, PerGroup(32), intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
        ),
    ),
    "intx3-asym-f16": (F16, IntxWeightOnlyConfig(torch.int3, PerGroup(32), mapping_type=ASYMMETRIC)),
    "intx4-noclip": (BF16, IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=NO_CLIPPING)),
    "intx5-f32-scale": (BF16, IntxWeightOnlyConfig(torch.int5, PerAxis(0), scale_dtype=F32)),
    "intx8-asym": (BF16, IntxWeightOnlyConfig(torch.int8, PerAxis(0), mapping_type=ASYMMETRIC)),
    "intx4-dynamic": (BF16, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))),
    "intx6-dynamic-asym-f32": (
        F32,
        Int8DynamicActivationIntxWeightConfig(torch.int6, PerGroup(32), weight_mapping_type=ASYMMETRIC),
    ),
    "float8-row": (BF16, Float8WeightOnlyConfig()),
    "float8-tensor-f16": (F16, Float8WeightOnlyConfig(granularity=PerTensor())),
    "float8-group-e5m2": (F32, Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2, granularity=PerGroup(32))),
}
GPU = {
    "tiles-g32": ((24, 160), Int4WeightOnlyConfig(group_size=32, int4_packing_format=TILES)),
    "tiles-g64-filled-up": ((20, 1152), Int4WeightOnlyConfig(group_size=64, int4_packing_format=TILES)),
    "tiles-hqq-g64": (
        (16, 1024),
        Int4WeightOnlyConfig(
            group_size=64, int4_packing_format=TILES, int4_choose_qparams_algorithm=Int4ChooseQParamsAlgorithm.HQQ
        ),
    ),
    "float8-dynamic-tensor": ((32, 64), Float8DynamicActivationFloat8WeightConfig()),
    "float8-dynamic-row": ((32, 64), Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())),
}


def record(name, dense, config, device, tensors, cases):
    """Quantize ``dense`` and note the flattened tensor, the header's entry, and what the layer makes of some inputs."""
    n, k = dense.shape
    layer = torch.nn.Linear(k, n, bias=False, dtype=dense.dtype, device=device)
    layer.weight.data.copy_(dense)
    quantize_(layer, config)
    flat, header = flatten_tensor_state_dict({"m.weight": layer.weight.data})
    inputs = torch.randn(6, k).to(dense.dtype)
    with torch.no_grad():
        found = {"dense": dense, "inputs": inputs, "outputs": layer(inputs.to(device))}
        if hasattr(layer.weight, "dequantize") and "tiles" not in name:
            found["dequantized"] = layer.weight.dequantize()
        else:
            found["dequantized"] = layer(torch.eye(k, dtype=dense.dtype, device=device)).t()
    found |= {key.removeprefix("m."): value for key, value in flat.items()}
    tensors.update({f"{name}.{key}": value.detach().cpu().contiguous() for key, value in found.items()})
    cases[name] = {"header": json.loads(header["m.weight"]), "config": config_to_dict(config)}


def main(output, more):
    """Write the cases that this machine can make, and those of ``more``."""
    torch.manual_seed(0)
    tensors, cases = {}, {}
    for name, (dtype, config) in CPU.items():
        dense = (torch.randn(32, 64) * 0.05).to(dtype)
        dense[3] *= 40
        if "float8" not in name:
            # torchao divides 0 by 0 in a row of zeros there.
            dense[5] = 0
        dense[7] = dense[7].abs()
        record(name, dense, config, "cpu", tensors, cases)
    if torch.cuda.is_available():
        for name, (size, config) in GPU.items():
            dense = (torch.randn(size) * 0.05).to(BF16)
            dense[0, :32] = 0
            record(name, dense, config, "cuda", tensors, cases)
    if more:
        with safe_open(more, framework="pt") as opened:
            taken = json.loads(opened.metadata()["cases"])
            wanted = {name: case for name, case in taken.items() if name in GPU}
            cases |= wanted
            for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                if key.partition(".")[0] in wanted:
                    tensors[key] = opened.get_tensor(key)
    save_file(tensors, output, metadata={"cases": json.dumps(cases)})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
