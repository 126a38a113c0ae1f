"""Writes golden.safetensors: weights, and what hqq makes of them. Run where hqq 0.2.8 is installed; qhub is not needed.

    python make_golden.py

Keys: ``weight.<name>`` the dense weights; ``<case>.<entry>`` the entries of ``HQQLinear.state_dict()``;
``<case>.dequantized`` what ``HQQLinear.dequantize()`` returns. The header's metadata hold each case's settings as JSON.
"""

import json
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file

N, K, SEED = 40, 64, 6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(N, K, generator=generator) * 0.05
    dense[0, 7] = 1.0  # an outlier
    dense[1] = 0.0  # a constant group: hqq gives it the scale 1
    dense[2] = 0.25
    dense[3, 1:] = 0.0
    dense[4] = 0.1 + torch.arange(K) * 1e-6  # narrower than the 1e-4 below which hqq takes a group for constant
    # Heavy tails in 1 bit: the error falls in each of the solver's 20 iterations.
    generator = torch.Generator().manual_seed(SEED)
    tails = torch.randn(N, K, generator=generator) / (torch.rand(N, K, generator=generator) + 0.05) * 0.05
    return {"tails": tails, **{name: dense.to(dtype) for name, dtype in DTYPES.items()}}


def cases() -> list[dict]:
    listed = []
    for nbits in (8, 4, 3, 2, 1):
        for axis in (0, 1):
            for group_size, dtype in ((64, "float32"), (8, "bfloat16"), (None, "float16")):
                listed.append({"nbits": nbits, "axis": axis, "group_size": group_size, "dtype": dtype})
        listed.append({"nbits": nbits, "axis": 1, "group_size": 64, "dtype": "float16", "view_as_float": True})
    # Groups that cross rows, and what only a hand-written config asks for.
    listed.append({"nbits": 4, "axis": 1, "group_size": 80, "dtype": "bfloat16"})
    listed.append({"nbits": 4, "axis": 1, "group_size": 32, "dtype": "float32", "optimize": False})
    listed.append({"nbits": 4, "axis": 0, "group_size": 32, "dtype": "float32", "round_zero": False})
    listed.append({"nbits": 2, "axis": 1, "group_size": 32, "dtype": "float32", "round_zero": True})
    listed.append({"nbits": 8, "axis": 1, "group_size": 64, "dtype": "float32", "channel_wise": False})
    listed += [{"nbits": 1, "axis": axis, "group_size": 64, "dtype": "float32", "weight": "tails"} for axis in (0, 1)]
    return listed


def main() -> None:
    dense = weights()
    tensors = {f"weight.{name}": value for name, value in dense.items()}
    described = {}
    for index, case in enumerate(cases()):
        values = BaseQuantizeConfig(nbits=case["nbits"], group_size=case["group_size"], axis=case["axis"])
        params = values["weight_quant_params"]
        params.update({k: v for k, v in case.items() if k in params})
        layer = torch.nn.Linear(K, N, bias=False)
        weight = case.get("weight", case["dtype"])
        layer.weight.data = dense[weight].clone()
        quantized = HQQLinear(layer, values, compute_dtype=DTYPES[case["dtype"]], device="cpu")
        name = f"case{index}"
        described[name] = {**params, "weight": weight}
        for entry, value in quantized.state_dict().items():
            tensors[f"{name}.{entry}"] = value.detach().clone()
        tensors[f"{name}.dequantized"] = quantized.dequantize().detach().clone()
    save_file(tensors, Path(__file__).with_name("golden.safetensors"), metadata={"cases": json.dumps(described)})


if __name__ == "__main__":
    main()
