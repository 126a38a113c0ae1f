"""Checks GGUF files between qhub and llama.cpp, both ways: the same weights, the same tokens, the same logits.

qhub quantizes a model in several mixes and saves it; gguf-py dequantizes every tensor of the file, and llama.cpp loads
it, cuts texts into tokens and computes logits. Then llama.cpp quantizes the unquantized file in the same mixes, and
qhub loads the results with ``from_pretrained(folder, gguf_file=...)``. Weights have to be equal bit for bit, tokens
too. Logits differ: llama.cpp rounds the activations to 8 bits where weights are quantized, and not in a file of F32.
qhub's processes import transformers. Run where qhub is installed; ``--peer``: the Python of an environment with
llama-cpp-python and gguf::

    python benchmarks/interop_gguf.py MODEL --text FILE --peer PYTHON --out FILE

Ends with an error when a weight or a token differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIXES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K",
    "IQ4_NL", "IQ4_XS", "IQ3_S", "TQ2_0", "MXFP4_MOE",
)  # fmt: skip
TOKENS = 256


def write(model_path: str, text: Path, work: Path) -> None:
    """Save the model in F32 and quantized in every mix, and what qhub makes of the texts."""
    import torch
    from qhub_gguf.config import GgufQuantConfig
    from qhub_gguf.container import TensorSource
    from qhub_gguf.container import write as write_file
    from qhub_gguf.metadata import extra_tensors, metadata_of
    from qhub_gguf.names import Mapping
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    whole = text.read_text()
    texts = [whole[start : start + 500] for start in range(0, 10_000, 500)]
    texts += ["", "a", " two  spaces", "ünïcode 你好 🙂 1234567 don't I'LL\n\n\tx"]
    tokens = [tokenizer(piece, split_special_tokens=True)["input_ids"] for piece in texts]
    (work / "texts.json").write_text(json.dumps({"texts": texts, "tokens": tokens, "input": tokens[0][:TOKENS]}))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    mapping, state = Mapping.for_config(model.config), model.state_dict()
    names = [name for name in state if not (name == "lm_head.weight" and model.config.tie_word_embeddings)]
    dense = {e.ggml: e.to_file(state[name]) for name, found in mapping.of_model(names).items() for e in found}
    dense |= extra_tensors(model.config, mapping.architecture)
    sources = {name: TensorSource("F32", tuple(tensor.shape), tensor) for name, tensor in dense.items()}
    (work / "qhub/F32").mkdir(parents=True)
    write_file(work / "qhub/F32/model.gguf", metadata_of(model.config, tokenizer, file_type=0), sources)
    del model, state, dense
    for mix in MIXES:
        config = GgufQuantConfig(file_type=mix)
        quantized = AutoModelForCausalLM.from_pretrained(model_path, quantization_config=config, dtype=torch.float32)
        quantized.save_pretrained(work / "qhub" / mix)


def read(folder: Path, work: Path) -> None:
    """Load every file of ``folder`` as people do, and keep its weights by name, its tokens and its logits."""
    import numpy as np
    import torch
    from qhub_gguf.container import GgufFile
    from qhub_gguf.names import Mapping, architecture_of
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stated = json.loads((work / "texts.json").read_text())
    for source in sorted(folder.iterdir()):
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
        tokens = [tokenizer(piece, split_special_tokens=True)["input_ids"] for piece in stated["texts"]]
        with torch.no_grad():
            logits = model(torch.tensor([stated["input"]])).logits[0]
        file = GgufFile.open(source / "model.gguf")
        parameters = Mapping.for_config(model.config, architecture_of(file)).of_file(file.tensors)
        weights = {}
        for name, entries in parameters.items():
            parameter = model.get_parameter(name)
            value = parameter.dequantize() if hasattr(parameter, "quant_layout") else parameter.detach()
            weights |= {entry.ggml: _in_file(entry, value) for entry in entries}
        np.savez(source / "qhub.npz", logits=logits.numpy(), **weights)
        (source / "tokens.json").write_text(json.dumps(tokens))


def _in_file(entry: Any, value: Any) -> Any:
    return entry.to_file(value.float()).numpy()


def peer(folder: Path, work: Path, mixes: list[str], out: Path) -> None:
    """Quantize with llama.cpp what ``mixes`` names, else compare what qhub read with gguf-py and llama.cpp."""
    import ctypes

    import gguf
    import llama_cpp
    import numpy as np

    if mixes:
        numbers = {kind.name.removeprefix("MOSTLY_"): int(kind) for kind in gguf.LlamaFileType}
        for mix in mixes:
            (folder / mix).mkdir(parents=True)
            parameters = llama_cpp.llama_model_quantize_default_params()
            parameters.ftype, parameters.nthread = numbers[mix], 1
            paths = bytes(work / "qhub/F32/model.gguf"), bytes(folder / mix / "model.gguf")
            if llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)):
                raise SystemExit(f"llama.cpp could not quantize to {mix}")
        return
    stated = json.loads((work / "texts.json").read_text())
    results = {}
    for source in sorted(folder.iterdir()):
        found = np.load(source / "qhub.npz")
        differing = []
        reader = gguf.GGUFReader(source / "model.gguf")
        for tensor in reader.tensors:
            if tensor.name in found:
                theirs = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(found[tensor.name].shape)
                if not np.array_equal(theirs, found[tensor.name]):
                    differing.append(f"{tensor.name} ({np.abs(theirs - found[tensor.name]).max():.1e})")
        model = llama_cpp.Llama(
            str(source / "model.gguf"), n_ctx=TOKENS, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
        )
        theirs_tokens = [model.tokenize(text.encode(), add_bos=True, special=False) for text in stated["texts"]]
        model.eval(stated["input"])
        logits = np.array(model.scores[: len(stated["input"])])
        difference = np.abs(logits - found["logits"])
        results[source.name] = {
            "size_bytes": (source / "model.gguf").stat().st_size,
            "tensors": len(reader.tensors),
            "tensors_compared": sum(tensor.name in found for tensor in reader.tensors),
            "weights_that_differ_from_gguf_py": differing,
            "texts_with_other_tokens": sum(
                own != other
                for own, other in zip(json.loads((source / "tokens.json").read_text()), theirs_tokens, strict=True)
            ),
            "logits_max_difference_to_llama_cpp": round(float(difference.max()), 4),
            "logits_mean_difference_to_llama_cpp": round(float(difference.mean()), 5),
            "same_next_token_percent": round(100 * float((logits.argmax(-1) == found["logits"].argmax(-1)).mean()), 1),
        }
    versions = {"llama_cpp_python": llama_cpp.__version__, "gguf": _version("gguf"), "numpy": np.__version__}
    out.write_text(json.dumps({"versions": versions, "files": results}))


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> None:
    """Run all stages, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", default="")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    if arguments.stage:
        stage, _, folder = arguments.stage.partition(":")
        place = arguments.work / folder
        if stage == "write":
            write(arguments.model, arguments.text, arguments.work)
        elif stage == "read":
            read(place, arguments.work)
        else:
            peer(place, arguments.work, list(MIXES) if stage == "quantize" else [], arguments.out)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)

        def run(python: str, stage: str, out: Path) -> None:
            command = [
                python,
                __file__,
                arguments.model,
                "--text",
                str(arguments.text),
                "--peer",
                "",
                "--out",
                str(out),
            ]
            subprocess.run(
                [*command, "--stage", stage, "--work", str(work)],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

        run(sys.executable, "write", work / "-")
        run(arguments.peer, "quantize:llama_cpp", work / "-")
        found: dict[str, Any] = {}
        for writer in ("qhub", "llama_cpp"):
            run(sys.executable, f"read:{writer}", work / "-")
            run(arguments.peer, f"compare:{writer}", work / f"{writer}.json")
            found[writer] = json.loads((work / f"{writer}.json").read_text())
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "model": Path(arguments.model).name,
        "versions": {
            "transformers": _version("transformers"),
            "torch": _version("torch"),
            **found["qhub"]["versions"],
        },
        "written_by_qhub": found["qhub"]["files"],
        "written_by_llama_cpp": found["llama_cpp"]["files"],
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    files = [*found["qhub"]["files"].items(), *found["llama_cpp"]["files"].items()]
    wrong = [name for name, one in files if one["weights_that_differ_from_gguf_py"] or one["texts_with_other_tokens"]]
    if wrong:
        raise SystemExit(f"weights or tokens differ: {wrong}")


if __name__ == "__main__":
    main()
