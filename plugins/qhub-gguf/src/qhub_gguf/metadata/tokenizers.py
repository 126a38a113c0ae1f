"""From the metadata of a GGUF file to a tokenizer of transformers, without gguf-py and the same in every version.

Source: llama-vocab.cpp: what it does with ``tokenizer.ggml.model`` = gpt2 (BPE on bytes), llama (SentencePiece's BPE:
the pair whose token has the highest score is joined), t5 (unigram), gemma4 (BPE on characters).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qhub.errors import CheckpointError, QhubError, UnsupportedError
from qhub_gguf.container import GgufFile
from qhub_gguf.metadata.splitting import IGNORE_MERGES, pre_tokenizer_of
from qhub_gguf.metadata.vocabulary import CONTROL, SPECIAL, UNKNOWN, USER_DEFINED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["tokenizer_of"]

_SPACE = "\u2581"


def tokenizer_of(file: GgufFile) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer and the keyword arguments for ``PreTrainedTokenizerFast(tokenizer_object=..., **kwargs)``:
    the special tokens and the chat template.

    Raises :class:`CheckpointError` for missing or contradictory entries, :class:`UnsupportedError` for a kind of
    tokenizer that is not known here.
    """
    vocabulary = _Vocabulary(file)
    kind = file.get("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise UnsupportedError(f"{file.path}: tokenizer.ggml.model is {kind!r}; those known are {sorted(_BUILDERS)}")
    named = vocabulary.special()
    try:
        tokenizer = _BUILDERS[kind](vocabulary)
        _add_tokens(tokenizer, vocabulary, kind)
        _surround(tokenizer, vocabulary, named, kind)
    except QhubError:
        raise
    except Exception as error:
        # The tokenizers library has no error class of its own: what it refuses comes as a bare Exception too.
        raise CheckpointError(f"{file.path}: its entries make no tokenizer: {error}") from error
    kwargs: dict[str, Any] = {f"{short}_token": vocabulary.tokens[number] for short, number in named.items()}
    # Said as None, or transformers invents <s> and </s>.
    kwargs = {**dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token")), **kwargs}
    template = file.get("tokenizer.chat_template")
    if isinstance(template, str):
        kwargs["chat_template"] = template
    return tokenizer, kwargs


class _Vocabulary:
    """Reads the entries once: the arrays are decoded anew at each access of the file."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.tokens: list[str] = self.array("tokens")
        if not self.tokens:
            raise CheckpointError(f"{file.path} holds no tokenizer: tokenizer.ggml.tokens is missing")
        self.types: list[int] = self.array("token_type") or [1] * len(self.tokens)
        self.scores: list[float] = self.array("scores") or [0.0] * len(self.tokens)
        self.merges: list[str] = self.array("merges")
        for key in ("tokens", "merges"):
            texts = self.tokens if key == "tokens" else self.merges
            for number, text in enumerate(texts):
                # Bytes that are no UTF-8 come out of the file as lone surrogates.
                if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                    raise CheckpointError(f"{file.path}: tokenizer.ggml.{key}[{number}] is no UTF-8: {text!r}")
        for name, array in (("token_type", self.types), ("scores", self.scores)):
            if len(array) != len(self.tokens):
                raise CheckpointError(
                    f"{file.path}: tokenizer.ggml.{name} has {len(array)} elements for {len(self.tokens)} tokens"
                )

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.get(f"tokenizer.ggml.{key}", default)

    def array(self, key: str) -> list[Any]:
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise CheckpointError(f"{self.file.path}: tokenizer.ggml.{key} must be an array")
        return value or []

    def special(self) -> dict[str, int]:
        """Return the ids of the special tokens that are named."""
        named = {}
        for short, name in SPECIAL.items():
            number = self.get(f"{name}_token_id")
            if number is None:
                continue
            if not isinstance(number, int) or not 0 <= number < len(self.tokens):
                raise CheckpointError(
                    f"{self.file.path}: tokenizer.ggml.{name}_token_id is {number!r}, of {len(self.tokens)} tokens"
                )
            named[short] = number
        return named

    def ids(self) -> dict[str, int]:
        """Return {token: id}; of equal tokens the first counts."""
        ids: dict[str, int] = {}
        for number, token in enumerate(self.tokens):
            ids.setdefault(token, number)
        return ids


def _pairs(vocabulary: _Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in vocabulary.merges:
        # The first character may itself be a space.
        cut = merge.find(" ", 1)
        pair = merge[:cut], merge[cut + 1 :]
        if cut < 0 or pair[0] not in ids or pair[1] not in ids or pair[0] + pair[1] not in ids:
            raise CheckpointError(
                f"{vocabulary.file.path}: tokenizer.ggml.merges has {merge!r}, which joins no two tokens to a third"
            )
        pairs.append(pair)
    return pairs


def _gpt2(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    ids, pre = vocabulary.ids(), vocabulary.get("pre")
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=_pairs(vocabulary, ids), fuse_unk=False, ignore_merges=pre in IGNORE_MERGES)
    )
    tokenizer.pre_tokenizer = pre_tokenizer_of(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _llama(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import normalizers

    # Runs of spaces are tokens of Gemma, written as they are.
    tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in vocabulary.tokens]
    vocabulary.tokens = tokens
    ids = vocabulary.ids()
    merges = _pairs(vocabulary, ids) or _merges_by_score(tokens, vocabulary.scores, vocabulary.types, ids)
    prefix = bool(vocabulary.get("add_space_prefix", True))
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    return _characters(
        vocabulary, ids, merges, normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)]), prefix
    )


def _gemma4(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import normalizers

    ids = vocabulary.ids()
    return _characters(vocabulary, ids, _pairs(vocabulary, ids), normalizers.Replace(" ", _SPACE), prefix=False)


def _characters(
    vocabulary: _Vocabulary, ids: dict[str, int], merges: list[tuple[str, str]], normalizer: Any, prefix: bool
) -> Tokenizer:
    """Return BPE on characters, with bytes for those that no token has."""
    from tokenizers import Tokenizer, decoders, models

    unknown = vocabulary.special().get(
        "unk", next((i for i, kind in enumerate(vocabulary.types) if kind == UNKNOWN), None)
    )
    text = None if unknown is None else vocabulary.tokens[unknown]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=text, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_by_score(
    tokens: list[str], scores: list[float], types: list[int], ids: dict[str, int]
) -> list[tuple[str, str]]:
    """Return every pair of tokens that makes a token, the best score first, as llama.cpp joins them."""
    merges: list[tuple[str, str]] = []
    joined = (1, USER_DEFINED, 5)
    # A stable sort: of equal scores the earlier token comes first.
    for number in sorted(range(len(tokens)), key=scores.__getitem__, reverse=True):
        token = tokens[number]
        if len(token) < 2 or types[number] not in joined:
            continue
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in ids:
                right = token[cut:]
                if right in ids:
                    merges.append((left, right))
    return merges


def _t5(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = list(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    unknown = vocabulary.special().get(
        "unk", next((i for i, kind in enumerate(vocabulary.types) if kind == UNKNOWN), None)
    )
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    steps: list[Any] = []
    charsmap = vocabulary.array("precompiled_charsmap")
    if charsmap:
        steps.append(normalizers.Precompiled(bytes(number & 0xFF for number in charsmap)))
    if vocabulary.get("remove_extra_whitespaces", False):
        from tokenizers import Regex

        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), _SPACE)]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if vocabulary.get("add_space_prefix", True) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme=scheme)
    return tokenizer


_BUILDERS = {"gpt2": _gpt2, "llama": _llama, "t5": _t5, "gemma4": _gemma4}


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary, kind: str) -> None:
    """Make control and user-defined tokens whole in any text."""
    from tokenizers import AddedToken

    control, user = [], []
    for token, sort in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if sort == CONTROL or (sort == UNKNOWN and kind != "gpt2"):
            control.append(AddedToken(token, normalized=False, special=True))
        elif sort == USER_DEFINED:
            user.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user)


def _surround(tokenizer: Tokenizer, vocabulary: _Vocabulary, named: dict[str, int], kind: str) -> None:
    """Put the tokens for beginning and end around every text, as the file says.

    What llama.cpp assumes where it does not: a beginning for SentencePiece and for Llama 3's and Tekken's splitting, an
    end for T5.
    """
    from tokenizers import processors

    # gemma4: llama.cpp insists on it; the chat template writes it too, and so the model's own tokenizer does not.
    assumed = kind == "llama" or (kind == "gpt2" and vocabulary.get("pre") in IGNORE_MERGES)
    begin = vocabulary.get("add_bos_token", assumed) and "bos" in named and kind != "gemma4"
    end = vocabulary.get("add_eos_token", kind == "t5") and "eos" in named
    if not begin and not end:
        return
    shown = {short: vocabulary.tokens[named[short]] for short, wanted in (("bos", begin), ("eos", end)) if wanted}
    before, after = ([shown["bos"]] if begin else []), ([shown["eos"]] if end else [])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, named[short]) for short, token in shown.items()],
    )
