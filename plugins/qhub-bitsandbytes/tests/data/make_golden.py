"""Writes golden.safetensors: weights, and the checkpoint entries that bitsandbytes makes of them on a CPU.

Run it where bitsandbytes is installed (0.50.2 wrote the committed file)::

    python make_golden.py [golden.safetensors]

``input/<dtype>/<shape>`` is a weight. A case ``<settings>/<shape>/`` holds its entries under their own names; settings
are ``int8-<dtype>`` or ``<quant type>-<dtype>-<storage>[-nested]``, where dtype is the weight's. ``scales/`` holds
values and what ``quantize_blockwise`` makes of them.
"""

import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Names say what is odd about a shape: ragged rows, a ragged end, an odd number of weights, more than one nested block.
SHAPES = {
    "whole": (6, 64),
    "ragged": (3, 100),
    "odd": (5, 37),
    "short": (1, 8),
    "nested2": (33, 512),
    "edges": (1, 124),
}


def weights(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return a random matrix with rows of very different size, a block and a tail of zeros, and some exact ties."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-4, 1, shape[0]).unsqueeze(1)
    if shape[0] > 2:
        weight[1] = 0
        weight[-1, -48:] = 0
        weight[2, 0] = 4.0 * weight[2].abs().max()
        # A quarter, half and eighth of the largest magnitude lie on or near the middle between FP4's values.
        weight[2, 1:4] = weight[2, 0] * torch.tensor([0.25, -0.5, 0.125])
    return weight.to(dtype)


def edges() -> torch.Tensor:
    """Return a block and a shorter one of float32 values that lie on one side of a middle or the other by a rounding.

    Middles are those between neighbours of the tables. Whoever divides by absmax where upstream multiplies with its
    reciprocal, or the other way round, gets other codes.
    """
    tables = [bnb.functional.get_4bit_type(name, device="cpu").sort().values for name in ("nf4", "fp4")]
    middles = torch.cat([(table[:-1] + table[1:]) / 2 for table in tables])
    found = []
    generator = torch.Generator().manual_seed(0)
    while len(found) < 2:
        absmax = torch.rand((), generator=generator) + 0.5
        near = (middles * absmax).repeat(5, 1)
        for row, steps in enumerate((-2, -1, 0, 1, 2)):
            for _ in range(abs(steps)):
                near[row] = torch.nextafter(near[row], torch.full_like(middles, steps * torch.inf))
        divided, multiplied = near / absmax, near * (1 / absmax)
        split = near[(divided > middles) != (multiplied > middles)].unique()
        if len(split) >= 3:
            found.append(torch.cat([absmax.reshape(1), split, torch.zeros(64)])[: (64, 60)[len(found)]])
    return torch.cat(found).unsqueeze(0)


def blockwise(weight: torch.Tensor, quant_type: str, storage: torch.dtype, nested: bool) -> dict[str, torch.Tensor]:
    """Return the entries of a Linear4bit that holds ``weight``."""
    settings = {"compress_statistics": nested, "quant_type": quant_type, "quant_storage": storage}
    linear = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, **settings)
    linear.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, **settings).to("cpu")
    return dict(linear.state_dict())


def int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the entries of a Linear8bitLt that holds ``weight``."""
    linear = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    linear.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return dict(linear.state_dict())


def main(path: Path) -> None:
    """Write all cases to ``path``."""
    torch.set_num_threads(1)
    tensors: dict[str, torch.Tensor] = {}

    def add(case: str, entries: dict[str, torch.Tensor]) -> None:
        tensors.update({f"{case}/{name}": entry.contiguous().clone() for name, entry in entries.items()})

    for seed, (shape_name, shape) in enumerate(SHAPES.items()):
        for dtype_name, dtype in DTYPES.items():
            if shape_name == ("nested2" if dtype_name == "float32" else "edges"):
                continue
            weight = edges() if shape_name == "edges" else weights(shape, dtype, seed)
            tensors[f"input/{dtype_name}/{shape_name}"] = weight
            add(f"int8-{dtype_name}/{shape_name}", int8(weight))
            for quant_type in ("nf4", "fp4"):
                for nested in (False, True):
                    storages = ["uint8"]
                    if shape_name == "whole" and dtype_name == "bfloat16":
                        storages = ["uint8", "int8", "bfloat16", "float16", "float32", "float64"]
                    for storage in storages:
                        case = f"{quant_type}-{dtype_name}-{storage}{'-nested' if nested else ''}/{shape_name}"
                        add(case, blockwise(weight, quant_type, getattr(torch, storage), nested))
    values = torch.rand(1 << 14, generator=torch.Generator().manual_seed(0)) ** 3
    offset = values.mean()
    codes, state = bnb.functional.quantize_blockwise(values - offset, blocksize=256)
    add("scales", {"input": values, "codes": codes, "supers": state.absmax, "offset": offset})
    save_file(tensors, path, metadata={"bitsandbytes": bnb.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("golden.safetensors"))
