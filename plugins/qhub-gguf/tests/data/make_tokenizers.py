"""Trains the small tokenizers in tokenizers/, on any English text (the first argument): one of each kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from qhub_gguf.metadata import splitting
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
TEXT = Path(sys.argv[1]).read_text()[:300_000].split("\n")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def byte_level(name: str, pre: Any, size: int = 360, ignore_merges: bool = False) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if size > 256 else []
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=alphabet,
            limit_alphabet=256 if size > 256 else 50,
            show_progress=False,
        ),
    )
    if size > 256:
        tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    write(name, tokenizer, bos_token="<s>", eos_token="</s>")


def split(expression: str) -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), last])


def sentencepiece(name: str, prefix: bool) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=440,
            special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
            limit_alphabet=70,
            show_progress=False,
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    whole = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    whole.normalizer = tokenizer.normalizer
    whole.add_special_tokens(special)
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    whole.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)] if prefix else after)
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    write(name, whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT[:3000], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    write("unigram", tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def write(name: str, tokenizer: Tokenizer, **tokens: str) -> None:
    stated = {"tokens": tokens, "tokenizer": json.loads(tokenizer.to_str())}
    (HERE / "tokenizers").mkdir(exist_ok=True)
    (HERE / f"tokenizers/{name}.json").write_text(json.dumps(stated, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    byte_level("tiny", BYTES, size=60)
    byte_level("gpt-2", BYTES)
    byte_level("llama-bpe", split(splitting._LLAMA3), ignore_merges=True)
    byte_level("smaug-bpe", split(splitting._LLAMA3))
    byte_level("qwen2", split(splitting._QWEN2))
    byte_level("qwen35", split(splitting._QWEN35))
    byte_level("tekken", split(splitting._TEKKEN), ignore_merges=True)
    byte_level("gpt-4o", split(splitting._GPT4O))
    byte_level("bloom", split(splitting._BLOOM))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level("starcoder", pre_tokenizers.Sequence([digits, BYTES]))
    thousands = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
    marks = pre_tokenizers.Punctuation("contiguous")
    byte_level("falcon", pre_tokenizers.Sequence([marks, BYTES, pre_tokenizers.Digits(False), thousands]))
    sentencepiece("sentencepiece", prefix=True)
    sentencepiece("sentencepiece-bare", prefix=False)
    unigram()
