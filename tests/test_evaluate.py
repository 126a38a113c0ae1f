"""The evaluation library: known values, float64 oracles, and the published figures of the embedded model."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qhub.errors import UnsupportedError
from qhub.evaluate import compare, decode_speed, kl_divergence, perplexity, windows_of

TEXTS = Path(__file__).resolve().parents[1] / "examples" / "text"


class Characters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


class Fixed(nn.Module):
    """A model that predicts ``logits[token]`` after each token, whatever came before."""

    def __init__(self, logits: torch.Tensor, longest: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(logits)
        text = SimpleNamespace(vocab_size=logits.shape[0], max_position_embeddings=longest)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.device = torch.device("cpu")

    def can_generate(self) -> bool:
        return True

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache and input_ids.shape[0] == 1
        return SimpleNamespace(logits=self.table(input_ids))


def random_logits(size: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def some_tokens(size: int, shape: tuple[int, int] = (5, 40)) -> torch.Tensor:
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(1))


def exact_losses(logits: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    log_q = logits.double().log_softmax(-1)
    return [-log_q[window[:-1], window[1:]].mean().item() for window in tokens]


def test_uniform_model_has_the_vocabulary_as_perplexity():
    result = perplexity(Fixed(torch.zeros(50, 50)), some_tokens(50))
    assert result.value == pytest.approx(50, rel=1e-6)
    assert result.standard_error == pytest.approx(0, abs=1e-4)
    assert result.tokens == 200 and result.seconds > 0 and result.tokens_per_second == 200 / result.seconds


def test_perplexity_is_the_exponential_of_the_mean_window_loss():
    logits, tokens = random_logits(64), some_tokens(64)
    losses = exact_losses(logits, tokens)
    mean = sum(losses) / 5
    variance = sum((loss - mean) ** 2 for loss in losses) / 4
    result = perplexity(Fixed(logits), tokens)
    # One float32 rounding per step of a loss of about 6.
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert result.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.standard_error == pytest.approx(math.exp(mean) * math.sqrt(variance / 5), rel=1e-3)


def test_one_window_has_no_standard_error():
    assert perplexity(Fixed(random_logits(64)), some_tokens(64, (1, 40))).standard_error is None


def test_broken_model_has_no_finite_perplexity():
    assert math.isnan(perplexity(Fixed(torch.full((8, 8), torch.nan)), some_tokens(8)).value)
    logits = torch.zeros(8, 8)
    logits[:, 0] = 1e4
    assert perplexity(Fixed(logits), torch.ones(2, 6, dtype=torch.int64)).value == math.inf


def test_kl_of_uniform_against_a_peak():
    # KL(uniform || q) = -log V - mean(log q); q has one logit of a among zeros.
    size, peak = 32, 2.0
    logits = torch.zeros(3, size)
    logits[:, 7] = peak
    expected = -math.log(size) + math.log(size - 1 + math.exp(peak)) - peak / size
    assert kl_divergence(torch.zeros(3, size), logits).tolist() == pytest.approx([expected] * 3, rel=1e-12)


def test_kl_takes_the_base_first_and_resolves_small_distances():
    base, model = random_logits(300), random_logits(300)[:300] + 1e-3 * random_logits(300, seed=2)
    p, log_q = base.double().softmax(-1), model.double().log_softmax(-1)
    expected = (p * (p.log() - log_q)).sum(-1)
    found = kl_divergence(base, model)
    # About 4e-6 each; a float32 sum is off by 1e-7.
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(kl_divergence(model, base), expected, rtol=1e-6, atol=0)


def test_kl_of_a_token_that_the_base_rules_out_is_finite():
    base = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert kl_divergence(base, base).tolist() == [0.0]
    assert kl_divergence(base, torch.zeros(1, 3)).tolist() == pytest.approx([math.log(3 / 2)])


def test_comparison_with_itself_finds_nothing():
    model, tokens = Fixed(random_logits(64)), some_tokens(64)
    result = compare(model, model, tokens)
    assert (result.kl_mean, result.kl_median, result.kl_p99, result.top1_agreement) == (0, 0, 0, 1)
    assert (result.difference, result.difference_error, result.positions) == (0, 0, 200)


def test_comparison_counts_positions_and_pairs_windows():
    base, tokens = random_logits(64), some_tokens(64)
    model = base.clone()
    # After token 3 the model is sure of another token than the base.
    model[3] = 0
    model[3, (base[3].argmax() + 1) % 64] = 20
    result = compare(Fixed(model), Fixed(base), tokens)
    flat = tokens.flatten()
    each = kl_divergence(base[flat], model[flat])
    assert result.top1_agreement == pytest.approx(1 - (flat == 3).double().mean().item())
    assert 0 < result.top1_agreement < 1
    assert result.kl_mean == pytest.approx(each.mean().item()) and result.kl_mean > 0
    assert result.kl_median == 0
    assert result.kl_p99 == pytest.approx(each.quantile(0.99).item())
    own, other = exact_losses(model, tokens), exact_losses(base, tokens)
    assert result.base.losses == pytest.approx(other, rel=1e-5)
    pairs = torch.tensor(own).double() - torch.tensor(other).double()
    error = math.exp(sum(own) / 5) * (pairs.std() / math.sqrt(5)).item()
    assert result.difference == pytest.approx(math.exp(sum(own) / 5) - math.exp(sum(other) / 5), rel=1e-4)
    assert result.difference_error == pytest.approx(error, rel=1e-3)


def test_windows_are_cut_from_the_beginning():
    found = windows_of(Characters(), "abcdefgh" * 3, count=3, length=5, characters=18)
    assert found.dtype == torch.int64
    assert ["".join(map(chr, row)) for row in found] == ["abcde", "fghab", "cdefg"]
    assert windows_of(Characters(), "abcdefgh" * 3, count=2, length=5).shape == (2, 5)
    assert windows_of(Characters(), "abcdefgh" * 3, count=9, length=5, characters=None).shape == (4, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 9}, "8 tokens, less than one window of 9"),
        ({"length": 1}, "at least one window"),
        ({"count": 0}, "at least one"),
    ],
)
def test_impossible_windows_are_refused(options, message):
    with pytest.raises(UnsupportedError, match=message):
        windows_of(Characters(), "abcdefgh", **options)


def test_tokens_that_the_model_cannot_read_are_refused():
    model = Fixed(torch.zeros(8, 8), longest=10)
    with pytest.raises(UnsupportedError, match="has token 8, Fixed knows 8"):
        perplexity(model, torch.full((1, 4), 8))
    with pytest.raises(UnsupportedError, match="windows of 11 tokens: Fixed was made for 10"):
        perplexity(model, torch.zeros(1, 11, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match=r"shape \(4,\)"):
        perplexity(model, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="do not share a vocabulary"):
        compare(model, Fixed(torch.zeros(9, 9)), torch.zeros(1, 4, dtype=torch.int64))
    model.can_generate = lambda: False
    with pytest.raises(UnsupportedError, match="needs a causal language model"):
        perplexity(model, torch.zeros(1, 4, dtype=torch.int64))


def test_decode_speed_times_as_many_tokens_as_asked(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    prompt = torch.arange(1, 9)
    # The model would stop after its first token.
    model.generation_config.eos_token_id = int(model(prompt[None]).logits[0, -1].argmax())
    assert model.generate(prompt[None], max_new_tokens=6, do_sample=False).shape[1] == 9
    result = decode_speed(model, prompt, new_tokens=6, runs=2)
    assert result.new_tokens == 6 and len(result.seconds) == 2
    assert result.tokens_per_second == pytest.approx(6 / (sum(result.seconds) / 2))


def test_decode_speed_refuses_what_does_not_fit(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("opt"))
    with pytest.raises(UnsupportedError, match="60 tokens and 6 new ones: OPTForCausalLM was made for 64"):
        decode_speed(model, torch.arange(1, 61), new_tokens=6)


@pytest.fixture(scope="module")
def embedded(doclm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(doclm, dtype=torch.float32), AutoTokenizer.from_pretrained(doclm)


# Figures published with the model, in as many digits as they have.
@pytest.mark.parametrize(("text", "published", "half_digit"), [("mix", 13.038, 5e-4), ("handbook", 50.50, 5e-3)])
def test_protocol_gives_the_published_perplexity(embedded, text, published, half_digit):
    model, tokenizer = embedded
    tokens = windows_of(tokenizer, (TEXTS / f"eval_{text}.txt").read_text(encoding="utf-8"))
    assert tokens.shape == (24, 512)
    assert perplexity(model, tokens).value == pytest.approx(published, abs=half_digit)


@pytest.mark.slow
def test_protocol_gives_the_published_distance_of_nf4(embedded, doclm):
    pytest.importorskip("qhub_bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(doclm, quantization_config=config, dtype=torch.float32).dequantize()
    tokens = windows_of(embedded[1], (TEXTS / "eval_mix.txt").read_text(encoding="utf-8"))
    result = compare(model, embedded[0], tokens)
    # bitsandbytes 0.50.2 itself, measured by the same protocol.
    assert result.model.value == pytest.approx(13.804, abs=5e-4)
    assert result.kl_mean == pytest.approx(0.0786, abs=5e-5)
    assert result.kl_p99 == pytest.approx(0.487, abs=5e-4)
    assert result.top1_agreement == pytest.approx(0.8507, abs=5e-5)
