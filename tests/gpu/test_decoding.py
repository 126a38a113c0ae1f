"""What only a GPU can show of decoding: captured steps, a loop that does not wait, steps that cannot be captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qhub
from qhub.decoding.graphs import GraphStep
from qhub.decoding.optimizing import _decoders
from tests.decoding.conftest import KINDS, build
from tests.decoding.test_generate import Collect, prompt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_gpu(batch: int = 1) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in prompt(batch).items()}


def both(model: torch.nn.Module, arguments: dict[str, Any], **settings: Any) -> list[Any]:
    settings = {"max_new_tokens": 40, "do_sample": False, **settings}
    found = []
    for enable in (False, True):
        _decoders.pop(model, None)
        qhub.optimize(model, enable)
        torch.manual_seed(1)
        found.append(model.generate(**arguments, **settings))
        found.append(torch.cuda.get_rng_state())
    assert torch.equal(found[1], found[3])
    return [found[0], found[2]]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("batch", [1, 3])
def test_same_tokens_from_captured_steps(kind, batch):
    model = build(kind).cuda()
    for settings in (
        {},
        {"do_sample": True, "top_k": 20},
        {"eos_token_id": list(range(20))},
        {"repetition_penalty": 1.2},
    ):
        plain, fast = both(model, on_gpu(batch), **settings)
        assert torch.equal(plain, fast), settings
    decoder = _decoders[model]
    if kind == "mixtral" and decoder.unable:
        pytest.skip(decoder.unable)
    assert not decoder.told
    (step,) = decoder.steps.values()
    assert isinstance(step, GraphStep)
    assert step.graphs
    assert kind == "gpt2" or step.found["layers"] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_half_precision_is_as_good_as_the_models_own(kind, dtype):
    wide = build(kind).cuda()
    model = build(kind).cuda().to(dtype)
    arguments = {**on_gpu(2), "max_new_tokens": 12, "do_sample": False}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    qhub.optimize(model, False)
    plain = model.generate(**arguments)
    qhub.optimize(model)
    fast = model.generate(**arguments)
    assert _decoders[model].steps
    qhub.optimize(wide, False)
    exact = wide(
        fast.sequences, attention_mask=torch.cat([arguments["attention_mask"], torch.ones(2, 12).cuda()], 1).long()
    )
    wanted = exact.logits[:, -13:-1].double()

    def error(out: Any) -> float:
        seen = torch.stack(out.logits, 1).double()
        return float((seen - wanted).norm() / wanted.norm())

    if torch.equal(plain.sequences, fast.sequences):
        assert error(fast) < 1.3 * error(plain)
    assert error(fast) < 0.1


def test_streams_and_user_caches():
    model = build("llama").cuda()
    streamers = [Collect(), Collect()]
    for enable, streamer in zip((False, True), streamers, strict=True):
        qhub.optimize(model, enable)
        model.generate(**on_gpu(), streamer=streamer, max_new_tokens=20, do_sample=False, eos_token_id=[5, 6, 7, 8, 9])
    assert streamers[0].seen == streamers[1].seen


def test_a_step_that_asks_the_host_falls_back():
    # A model whose parts have no fused form: its own code is captured.
    model = build("gpt2").cuda()
    mlp = model.transformer.h[1].mlp
    inner = type(mlp)

    class Asking(inner):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return inner.forward(self, x) if bool((x == x).all()) else x * 0

    mlp.__class__ = Asking
    plain, fast = both(model, on_gpu(2))
    assert torch.equal(plain, fast)
    assert "captured" in _decoders[model].unable
    plain, fast = both(model, on_gpu(2), do_sample=True)
    assert torch.equal(plain, fast)


def test_few_steps_are_kept():
    model = build("llama").cuda()
    qhub.optimize(model)
    for batch in (1, 2, 3, 4):
        model.generate(**on_gpu(batch), max_new_tokens=20, do_sample=False)
    assert len(_decoders[model].steps) == 2
