"""LoftQ: LoRA starts nearer to the unquantized model than zeros do, on every method and width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qhub
from qhub.errors import CheckpointError, ConfigError
from qhub.evaluate import kl_divergence
from qhub.integrations.peft.low_rank import factors_of
from qhub.tensor import QuantizedTensor

_LORA: dict[str, Any] = {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"}


def _configs() -> dict[str, Any]:
    from transformers import BitsAndBytesConfig, GPTQConfig, HqqConfig

    texts = [
        [int(t) for t in torch.randint(0, 8192, (64,), generator=torch.Generator().manual_seed(i))] for i in range(4)
    ]
    gptq = {f"gptq{bits}": GPTQConfig(bits=bits, group_size=64, dataset=texts) for bits in (4, 3, 2)}
    hqq = {f"hqq{bits}": HqqConfig(nbits=bits, group_size=64) for bits in (4, 3, 2)}
    return {"nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), **gptq, **hqq}


def _quantized(source: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        source, quantization_config=_configs()[name], dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def dense(doclm: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(doclm, dtype=torch.float32, attn_implementation="eager")


def _error(model: Any, dense: Any) -> float:
    """Return the mean relative error of base plus adapter, computed here in float64."""
    errors = []
    own = dict(dense.named_parameters())
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and isinstance(layer.base_layer.weight, QuantizedTensor):
            true = own[name.removeprefix("base_model.model.") + ".weight"].double()
            got = (
                layer.base_layer.weight.dequantize(torch.float32).double() + layer.get_delta_weight("default").double()
            )
            errors.append(float((got - true).norm().detach() / true.norm().detach()))
    assert len(errors) == 28
    return sum(errors) / len(errors)


@pytest.mark.parametrize("name", ["nf4", "gptq4", "gptq3", "gptq2", "hqq4", "hqq3", "hqq2"])
def test_the_error_falls_with_one_step_and_further_with_five(doclm: Path, dense: Any, name: str) -> None:
    """Below LoRA's zero start, as computed in float64; one step leaves the codes alone, five do not."""
    import peft

    model = peft.get_peft_model(_quantized(doclm, name), peft.LoraConfig(**_LORA))
    zero = _error(model, dense)
    codes = [p.parts["qweight"].clone() for p in model.parameters() if isinstance(p, QuantizedTensor)]
    report = qhub.loftq_init(model, doclm)
    one = _error(model, dense)
    assert report.before == pytest.approx(zero, rel=1e-4) and report.after == pytest.approx(one, rel=1e-4)
    assert one < 0.95 * zero and not report.requantized
    now = [p.parts["qweight"] for p in model.parameters() if isinstance(p, QuantizedTensor)]
    assert all(torch.equal(before, after) for before, after in zip(codes, now, strict=True))
    report = qhub.loftq_init(model, dense, steps=5)
    assert _error(model, dense) == pytest.approx(report.after, rel=1e-4)
    assert report.after < 0.98 * one and report.requantized


def test_predictions_come_nearer_too(doclm: Path, dense: Any) -> None:
    """KL from the unquantized model is smaller with the new start than with zeros, on 3-bit HQQ."""
    import peft

    model = peft.get_peft_model(_quantized(doclm, "hqq3"), peft.LoraConfig(**_LORA)).eval()
    tokens = torch.randint(0, 8192, (2, 64), generator=torch.Generator().manual_seed(0))

    def kl() -> float:
        with torch.no_grad():
            return float(kl_divergence(dense(tokens).logits.flatten(0, 1), model(tokens).logits.flatten(0, 1)).mean())

    before = kl()
    qhub.loftq_init(model)
    assert kl() < 0.9 * before


def test_peft_s_own_switch_works_on_quantized_and_dense_bases(doclm: Path, dense: Any) -> None:
    """init_lora_weights="loftq" needs no GPU and no bitsandbytes: a quantized base, or one made NF4 numbers."""
    import peft
    from transformers import AutoModelForCausalLM

    pytest.importorskip("scipy", reason="PEFT asks for it before it makes such a config")
    wanted = peft.LoraConfig(**_LORA, init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_iter=2))
    plain = peft.get_peft_model(_quantized(doclm, "nf4"), peft.LoraConfig(**_LORA))
    model = peft.get_peft_model(_quantized(doclm, "nf4"), wanted)
    assert _error(model, dense) < 0.95 * _error(plain, dense)
    base = AutoModelForCausalLM.from_pretrained(doclm, dtype=torch.float32)
    adapted = peft.get_peft_model(base, wanted)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    true = dense.model.layers[0].mlp.up_proj.weight
    codes, whole = layer.base_layer.weight, layer.base_layer.weight + layer.get_delta_weight("default")
    assert float((whole - true).detach().norm()) < 0.95 * float((codes - true).detach().norm())
    # NF4: 16 values in each block of 64.
    block = codes.detach().flatten()[:64]
    assert len(torch.unique((block / block.abs().max()).mul(1e4).round())) <= 16


def test_a_checkpoint_does_not_know_its_unquantized_weights(doclm: Path, tmp_path: Path) -> None:
    """Named in the error, with what to call; then that works. Wrong models and steps are refused."""
    import peft
    from transformers import AutoModelForCausalLM

    _quantized(doclm, "hqq4").save_pretrained(tmp_path)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), peft.LoraConfig(**_LORA))
    with pytest.raises(ConfigError, match=r"loftq_init\(peft_model, dense=FOLDER\)"):
        qhub.loftq_init(model)
    with pytest.raises(CheckpointError, match="lack model.layers.0"):
        qhub.loftq_init(model, {"model.norm.weight": torch.ones(4)})
    for steps in (0, 1.5, True):
        with pytest.raises(ConfigError, match="steps"):
            qhub.loftq_init(model, doclm, steps=steps)
    with pytest.raises(ConfigError, match="no LoRA adapter 'other'"):
        qhub.loftq_init(model, doclm, adapter="other")
    small = {name: p[:4] for name, p in AutoModelForCausalLM.from_pretrained(doclm).named_parameters()}
    with pytest.raises(CheckpointError, match="name the model that was quantized"):
        qhub.loftq_init(model, small)
    assert qhub.loftq_init(model, doclm).after > 0


@pytest.mark.parametrize(("size", "rank"), [((40, 96), 8), ((40, 96), 60), ((1100, 1200), 8)])
def test_factors_are_the_best_of_their_rank(size: tuple[int, int], rank: int) -> None:
    """Their error is that of the truncated decomposition in float64, within 2 % where it is randomized."""
    matrix = torch.randn(size, generator=torch.Generator().manual_seed(0))
    up, down = factors_of(matrix, rank)
    assert up.shape == (size[0], rank) and down.shape == (rank, size[1])
    values = torch.linalg.svdvals(matrix.double())
    best = float(values[rank:].square().sum().sqrt())
    assert float((matrix - up @ down).double().norm()) <= 1.02 * best + 1e-3
