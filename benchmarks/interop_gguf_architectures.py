"""Checks that llama.cpp computes with qhub's GGUF files what transformers computes, for every architecture.

The tiny models of plugins/qhub-gguf/tests are written in F32; llama.cpp loads each and computes the logits of 40
tokens. Differences: GELU, which ggml looks up in a table of float16 (about 1e-3), else rounding. T5 is left out: it has
an encoder. Run where qhub is installed; ``--peer``: the Python of an environment with llama-cpp-python::

    python benchmarks/interop_gguf_architectures.py --peer PYTHON --out FILE

Ends with an error when logits differ by more than 0.005.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "plugins/qhub-gguf/tests/data"
IDS = list(range(3, 43))
ALLOWED = 5e-3
_DELTA = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"], "head_dim": 256}
# What llama.cpp needs besides: heads that its rotary embeddings fit in, norms of q and k only from 64 layers on.
CHANGED: dict[str, dict[str, Any]] = {
    "qwen3_5": {**_DELTA, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "qwen3_5_moe": {**_DELTA, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "minimax_m2": {"head_dim": 128, "rotary_dim": 64},
    "gpt_oss": {"head_dim": 64, "max_position_embeddings": 131072},
    "cohere": {"use_qk_norm": False},
}


def write(work: Path) -> None:
    """Write the files, and the logits that transformers computes."""
    import numpy as np
    import torch
    from qhub_gguf.container import TensorSource
    from qhub_gguf.container import write as write_file
    from qhub_gguf.metadata import extra_tensors, metadata_of
    from qhub_gguf.names import Mapping
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = importlib.util.spec_from_file_location("tiny_models", DATA / "tiny_models.py")
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    stated = json.loads((DATA / "tokenizers/tiny.json").read_text())
    backend = Tokenizer.from_str(json.dumps(stated["tokenizer"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **stated["tokens"])
    for name, (model_class, config_class, settings) in tiny.MODELS.items():
        if "t5" in name:
            continue
        tiny.MODELS[name] = (model_class, config_class, {**settings, **CHANGED.get(name, {})})
        model = tiny.build(name)
        mapping, state = Mapping.for_config(model.config), model.state_dict()
        names = [key for key in state if not (key == "lm_head.weight" and model.config.tie_word_embeddings)]
        dense = {e.ggml: e.to_file(state[key]) for key, found in mapping.of_model(names).items() for e in found}
        dense |= extra_tensors(model.config, mapping.architecture)
        sources = {key: TensorSource("F32", tuple(tensor.shape), tensor.float()) for key, tensor in dense.items()}
        write_file(work / f"{name}.gguf", metadata_of(model.config, tokenizer, file_type=0), sources)
        with torch.no_grad():
            np.save(work / f"{name}.npy", model(torch.tensor([IDS])).logits[0].numpy())


def compare(path: Path) -> None:
    """Print what llama.cpp makes of one file: in a process of its own, since it ends the process where it disagrees."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
    model.eval(IDS)
    expected = np.load(path.with_suffix(".npy"))
    difference = float(np.abs(np.array(model.scores[: len(IDS)]) - expected).max())
    print(
        json.dumps({"max_difference": float(f"{difference:.2e}"), "max_logit": round(float(np.abs(expected).max()), 2)})
    )


def main() -> None:
    """Write all files, compare each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--compare", type=Path)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write)
        return
    if arguments.compare:
        compare(arguments.compare)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--write", folder], check=True, env=environment)
        for path in sorted(Path(folder).glob("*.gguf")):
            command = [arguments.peer, __file__, "--compare", str(path)]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            lines = ran.stdout.strip().splitlines()
            results[path.stem] = (
                json.loads(lines[-1]) if ran.returncode == 0 and lines else {"error": ran.stderr[-200:]}
            )
    report = {"date": datetime.date.today().isoformat(), "models": results}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    wrong = [name for name, one in results.items() if one.get("max_difference", 1) > ALLOWED]
    if wrong:
        raise SystemExit(f"llama.cpp computes something else: {wrong}")


if __name__ == "__main__":
    main()
