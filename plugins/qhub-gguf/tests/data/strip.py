"""Makes the references of this folder from a folder of fixtures: python strip.py FIXTURES.

``reference.json`` per case: token ids, logits of a dense float32 model with the dequantized weights, and the SHA-256 of
each dequantized weight in float32, as llama.cpp's own decoder gives them.
"""

import hashlib
import json
import sys
from pathlib import Path

from safetensors.torch import load_file

for case in ("q4_k_m", "mix-legacy", "mix-iq"):
    tensors = load_file(Path(sys.argv[1]) / f"gguf-{case}" / "reference.safetensors")
    weights = {name.removeprefix("dequant."): tensor for name, tensor in tensors.items() if name.startswith("dequant.")}
    reference = {
        "input_ids": tensors["input_ids"].tolist(),
        "logits": [[round(float(x), 6) for x in row[:16]] for row in tensors["logits_dequant"][0]],
        "weights": {name: hashlib.sha256(w.contiguous().numpy().tobytes()).hexdigest() for name, w in weights.items()},
    }
    (Path(__file__).parent / case / "reference.json").write_text(json.dumps(reference, indent=1) + "\n")
