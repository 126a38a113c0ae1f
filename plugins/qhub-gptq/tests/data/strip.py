"""Makes this folder's data from checkpoints that gptqmodel 7.7.0 wrote (one-layer Llamas).

    python strip.py FOLDER

FOLDER holds one folder a checkpoint, with ``reference.safetensors`` beside the weights: ``input_ids``, ``logits`` of
gptqmodel's own forward in float16 on a CPU, ``logits_dequant`` of a float32 model with the dequantized weights, and
``dequant.<parameter>``, what gptqmodel dequantizes each layer to (float16 values).

    layers.safetensors  ``<case>/<module>/<entry>`` of some layers, ``<case>/<module>/dequant`` as float16
    tiny-llama-*        whole checkpoints, with their logits
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
CASES = ("b2-g32", "b3-g32", "b4-g32", "b8-g32", "b4-g32-asym", "b4-g32-act", "b3-g128-act-asym-v2")
# v1 with act-order; zeros of 0 that borrow; v2, 3 bits, act-order in two groups.
WHOLE = ("b4-g32-act", "b4-g32-asym", "b3-g128-act-asym-v2")
LAYERS = {case: ("self_attn.k_proj", "mlp.down_proj") if "act" in case else ("self_attn.k_proj",) for case in CASES}
# One of its zeros is 0.
LAYERS["b4-g32-asym"] = ("self_attn.k_proj", "mlp.gate_proj")


def main(folder: Path) -> None:
    tensors, configs = {}, {}
    for case in CASES:
        source = folder / f"gptq-{case}"
        weights, reference = load_file(source / "model.safetensors"), load_file(source / "reference.safetensors")
        values = json.loads((source / "config.json").read_text())["quantization_config"]
        configs[case] = values
        for module in LAYERS[case]:
            prefix = f"model.layers.0.{module}"
            for entry in ("qweight", "qzeros", "scales", "g_idx"):
                tensors[f"{case}/{module}/{entry}"] = weights[f"{prefix}.{entry}"]
            dense = reference[f"dequant.{prefix}.weight"]
            assert torch.equal(dense.half().float(), dense)
            tensors[f"{case}/{module}/dequant"] = dense.half()
        if case in WHOLE:
            target = HERE / f"tiny-llama-{case}"
            target.mkdir(exist_ok=True)
            for name in ("config.json", "model.safetensors"):
                shutil.copyfile(source / name, target / name)
            kept = {name: reference[name] for name in ("input_ids", "logits_dequant")}
            save_file(kept, target / "reference.safetensors")
    save_file(tensors, HERE / "layers.safetensors", metadata={"configs": json.dumps(configs)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
