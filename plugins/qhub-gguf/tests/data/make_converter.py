"""Writes converter.json: what llama.cpp's own converter makes of the tiny models of tiny_models.py.

Run with a checkout of llama.cpp (its folder as the argument) and its gguf-py, torch and transformers installed. For
each model: the hyperparameters it writes, and for each tensor its shape and the beginning of the SHA-256 of its
float32 bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# The converter wants these in config.json; transformers does not write them.
EXTRA: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 64},
    "falcon": {"num_kv_heads": 1},
    "t5": {"decoder_start_token_id": 0},
    "t5-plain": {"decoder_start_token_id": 0},
    "minimax_m2": {"rotary_dim": 8, "scoring_func": "sigmoid"},
    "qwen3_5": {"mtp_num_hidden_layers": 0},
    "qwen3_5_moe": {"mtp_num_hidden_layers": 0},
}


def main(llama: Path) -> None:
    sys.path[:0] = [str(llama / "gguf-py"), str(llama)]
    import conversion
    import gguf
    from conversion import base

    spec = importlib.util.spec_from_file_location("tiny_models", HERE / "tiny_models.py")
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tiny.MODELS:
            source = Path(folder) / name
            model = tiny.build(name)
            model.save_pretrained(source)
            settings = json.loads((source / "config.json").read_text())
            settings |= EXTRA.get(name, {})
            (source / "config.json").write_text(json.dumps(settings))
            vocab = {f"t{number}": number for number in range(64)}
            (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
            found[name] = convert(source, Path(folder) / f"{name}.gguf", base, conversion, gguf)
            print(name, len(found[name]["tensors"]))
    (HERE / "converter.json").write_text(json.dumps(found, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def convert(source: Path, target: Path, base: Any, conversion: Any, gguf: Any) -> dict[str, Any]:
    """Convert one folder and describe the file."""
    settings = base.ModelBase.load_hparams(source, False)
    model_class = conversion.get_model_class(base.get_model_architecture(settings, base.ModelType.TEXT))
    model_class.set_vocab = lambda self: None
    model_class.no_mtp = True
    model_class(source, gguf.LlamaFileType.ALL_F32, target).write()
    reader = gguf.GGUFReader(target)
    architecture = reader.fields["general.architecture"].contents()
    values = {}
    for key, value in reader.fields.items():
        if key.startswith(f"{architecture}."):
            kinds = [kind.name for kind in value.types]
            values[key.removeprefix(f"{architecture}.")] = ["/".join(kinds), value.contents()]
    tensors = {
        tensor.name: [
            [int(size) for size in reversed(tensor.shape)],
            hashlib.sha256(tensor.data.astype("<f4").tobytes()).hexdigest()[:12],
        ]
        for tensor in reader.tensors
    }
    return {"architecture": architecture, "values": values, "tensors": tensors}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
