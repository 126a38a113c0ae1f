"""Writes the files of upstream that the tests read: run with llama-cpp-python and gguf-py installed.

quantized.gguf: a tiny Llama as ``llama_model_quantize`` wrote it (Q4_0). split/: the same, split by gguf-py's writer.
mixes.json: which types llama.cpp would choose, from its dry run. tokenizers/: small tokenizers of every kind, and in
ids.json what llama.cpp makes of some texts with them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch
from qhub_gguf.container import GgufFile, TensorSource, write
from qhub_gguf.metadata import extra_tensors, metadata_of
from qhub_gguf.mixes import FILE_TYPES
from qhub_gguf.names import Mapping
from tokenizers import Tokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
# llama.cpp calls them to the end.
CALLBACKS: list[Any] = []
TEXTS = [
    "The SOFTWARE is provided 'as is', without warranty; see section 12.3 (b) of RFC-2616.\n\n\tint main(void) {}\n",
    "I'll say we've DON'T    stop -- naive cafe 1234567 3.14 1,234 x",
    " a leading space, and two  spaces",
    "ünïcode: straße, 你好世界, привет, 🙂🙂",
    "",
    "a",
]
# For the mixes: what of a config decides, with 256 columns, and 288 for rows that are no multiple.
MIXES: dict[str, dict[str, Any]] = {
    "llama": dict(num_hidden_layers=17, num_attention_heads=8, num_key_value_heads=2),
    "tied": dict(num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True),
    "odd": dict(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, intermediate_size=288),
    "mixtral": dict(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, num_local_experts=8),
    "falcon": dict(num_hidden_layers=17, num_attention_heads=4),
    "phi3": dict(num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=2),
}


def tiny_models() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_models", HERE / "tiny_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(path: Path) -> Any:
    stated = json.loads(path.read_text())
    tokenizer = Tokenizer.from_str(json.dumps(stated["tokenizer"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **stated["tokens"])


def save(model: Any, tokenizer: Any, path: Path) -> None:
    mapping, state = Mapping.for_config(model.config), model.state_dict()
    names = [name for name in state if not (name == "lm_head.weight" and model.config.tie_word_embeddings)]
    tensors = {e.ggml: e.to_file(state[name]).float() for name, es in mapping.of_model(names).items() for e in es}
    tensors |= extra_tensors(model.config, mapping.architecture)
    sources = {name: TensorSource("F32", tuple(tensor.shape), tensor) for name, tensor in tensors.items()}
    write(path, metadata_of(model.config, tokenizer, file_type=0, name="tiny"), sources)


def quantized(folder: Path, tokenizer: Any) -> None:
    model = tiny_models().build("llama")
    save(model, tokenizer, folder / "f32.gguf")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FILE_TYPES["Q4_0"].number, 1
    target = HERE / "quantized.gguf"
    assert llama_cpp.llama_model_quantize(bytes(folder / "f32.gguf"), bytes(target), ctypes.byref(parameters)) == 0
    shutil.rmtree(HERE / "split", ignore_errors=True)
    (HERE / "split").mkdir()
    reader = gguf.GGUFReader(target)
    writer = gguf.GGUFWriter(HERE / "split/model.gguf", "llama", split_max_tensors=8)
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mixes(folder: Path, tokenizer: Any) -> None:
    import transformers

    log: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text.decode(errors="replace")))
    CALLBACKS.append(callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    classes = {"mixtral": "Mixtral", "falcon": "Falcon", "phi3": "Phi3"}
    found: dict[str, Any] = {}
    for name, own in MIXES.items():
        kind = classes.get(name, "Llama")
        settings = dict(vocab_size=64, hidden_size=256, intermediate_size=256, pad_token_id=0) | own
        if name == "falcon":
            settings |= dict(multi_query=True, alibi=False, bias=False)
            del settings["intermediate_size"]
        config = getattr(transformers, f"{kind}Config")(**settings)
        save(getattr(transformers, f"{kind}ForCausalLM")(config), tokenizer, folder / f"{name}.gguf")
        shapes = {key: info.shape for key, info in GgufFile.open(folder / f"{name}.gguf").tensors.items()}
        found[name] = {"class": f"{kind}Config", "settings": settings, "shapes": shapes, "types": {}}
        for file_type in FILE_TYPES.values():
            for importance in (False, True):
                types = dry_run(folder / f"{name}.gguf", file_type.number, importance, log)
                if types:
                    key = file_type.name + (" importance" if importance else "")
                    found[name]["types"][key] = " ".join(types[tensor] for tensor in shapes)
    (HERE / "mixes.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


def dry_run(path: Path, number: int, importance: bool, log: list[str]) -> dict[str, str]:
    """Return what llama.cpp says it would do; empty where it refuses."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.dry_run = number, 1, True
    one = (ctypes.c_float * 1)(1.0)
    entries = (llama_cpp.llama_model_imatrix_data * 2)()
    entries[0].name, entries[0].data, entries[0].size = b"none", ctypes.cast(one, ctypes.POINTER(ctypes.c_float)), 1
    if importance:
        parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    log.clear()
    if llama_cpp.llama_model_quantize(bytes(path), b"/dev/null", ctypes.byref(parameters)):
        return {}
    line = re.compile(
        r"\]\s+(\S+)\s+- \[[^\]]*\], type =\s+(\S+),\s*(?:size =\s+[\d.]+ MiB(?: ->\s+[\d.]+ MiB \((\S+)\))?)?"
    )
    return {match[1]: (match[3] or match[2]).upper() for match in line.finditer("".join(log))}


def token_ids(folder: Path) -> None:
    found = {}
    for source in sorted((HERE / "tokenizers").glob("*.json")):
        if source.stem == "ids":
            continue
        tokenizer = load(source)
        config = LlamaConfig(vocab_size=len(tokenizer) + 3, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        embeddings = TensorSource("F32", (config.vocab_size, 32), torch.zeros(config.vocab_size, 32))
        path = folder / f"{source.stem}.gguf"
        write(path, metadata_of(config, tokenizer, file_type=0), {"token_embd.weight": embeddings})
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        found[source.stem] = [model.tokenize(text.encode(), add_bos=True, special=False) for text in TEXTS]
    (HERE / "tokenizers/ids.json").write_text(json.dumps({"texts": TEXTS, "ids": found}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    small = load(HERE / "tokenizers/tiny.json")
    with tempfile.TemporaryDirectory() as name:
        quantized(Path(name), small)
        mixes(Path(name), small)
        token_ids(Path(name))
