"""Makes this folder's ``inc-*``: checkpoints that Intel Neural Compressor (neural-compressor-pt 3.10) writes on a CPU.

    python make_inc.py MODEL

MODEL: a one-layer Llama. ``reference.safetensors`` beside the weights holds ``input_ids``, ``logits`` of the library's
own model, and ``dequant.<parameter>``: what its layers dequantize to; ``measured.json`` is its file of measurements.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from neural_compressor.torch.quantization import FP8Config, convert, finalize_calibration, prepare, save
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
CASES = {
    "inc-pow2": {"scale_method": "maxabs_pow2", "hp_dtype": "fp32", "scale_format": "scalar"},
    "inc-channels": {
        "scale_method": "act_maxabs_pow2_weights_pcs_maxabs_pow2", "hp_dtype": "fp32", "scale_format": "const"
    },
}  # fmt: skip
LAYERS = ("self_attn.k_proj", "mlp.down_proj")


def main(source: str) -> None:
    scratch = Path(tempfile.mkdtemp())
    for name, settings in CASES.items():
        target = HERE / name
        shutil.rmtree(target, ignore_errors=True)
        ids = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(0))
        config = FP8Config(
            **settings,
            use_qdq=True,
            dump_stats_path=str(scratch / name / "measured"),
            blocklist={"names": ["lm_head"], "types": []},
            allowlist={"names": [], "types": ["Linear"]},
        )
        model = prepare(AutoModelForCausalLM.from_pretrained(source).eval(), config)
        with torch.no_grad():
            model(ids)
        finalize_calibration(model)
        model = convert(model)
        with torch.no_grad():
            found = {"input_ids": ids, "logits": model(ids).logits}
        for layer in LAYERS:
            own = model.get_submodule(f"model.layers.0.{layer}")
            found[f"dequant.model.layers.0.{layer}.weight"] = own.dequant_weights(own.weight).t().contiguous()
        save(model, str(target))
        save_file(found, target / "reference.safetensors")
        shutil.copyfile(scratch / name / "measured_hooks_maxabs.json", target / "measured.json")
        for file in ("generation_config.json", "quantization_config.json"):
            (target / file).unlink(missing_ok=True)
        values = json.loads((target / "config.json").read_text())
        # Paths of the machine that made them; and the name of the method, which the library leaves out, in one of them.
        values["quantization_config"] |= {"_json_file": None, "dump_stats_path": "measured"}
        if name == "inc-channels":
            values["quantization_config"]["quant_method"] = "inc"
        (target / "config.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
