"""Input scales go into the operation before a layer where that changes nothing, into the layer's layout elsewhere."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM


def equalized(watched, folder, samples, **options):
    config = watched.config(equalize=True, options={"data": samples, "sequential": "block"}, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def scaled(model):
    return sorted(
        name
        for name in model.hf_quantizer.plan
        if any(t.kind == "scale" for t in model.get_parameter(name).quant_layout.transforms)
    )


@pytest.mark.parametrize(
    ("architecture", "carried"),
    [
        # Everything folds: norms, the value heads (two query heads share one), the up projection.
        ("llama", []),
        # A ReLU lets positive factors through.
        ("opt", []),
        # A GELU does not; the value's channels are the last third of the attention's fused projection.
        ("gpt2", ["mlp.c_proj"]),
        # One norm stands before all experts and the router, and each expert has scales of its own.
        ("mixtral", ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
    ],
)
def test_where_the_scales_go(watched, tiny, tokens, architecture, carried):
    folder, samples = tiny(architecture), tokens(count=8, length=48)
    model = equalized(watched, folder, samples)
    assert {name.removesuffix(".weight").split(".", 3)[-1] for name in scaled(model)} == set(carried)
    # 8 bits round little: had a scale gone wrong, the logits would be off by as much as scales differ from 1.
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([samples[0]])
    wanted, found = base(ids).logits, model(ids).logits
    wanted, found = wanted.detach(), found.detach()
    assert float((wanted - found).norm() / wanted.norm()) < 0.05
    if architecture == "llama":
        assert not torch.equal(
            model.model.layers[0].input_layernorm.weight, base.model.layers[0].input_layernorm.weight
        )


def test_heads_that_share_a_value_are_tied(watched, tiny, tokens):
    equalized(watched, tiny("llama"), tokens())
    tied = dict(zip(map(tuple, watched.groups), watched.tied, strict=True))
    ties = tied["model.layers.0.self_attn.o_proj.weight",]
    # 4 query heads of 16, 2 value heads: features h*16+d of heads 0 and 1 come from value channel d.
    place = torch.arange(64)
    assert torch.equal(ties, place // 32 * 16 + place % 16)
    assert tied["model.layers.0.mlp.down_proj.weight",] is None


def test_statistics_after_folding_are_of_the_divided_input(watched, tiny, tokens):
    folder, samples = tiny("llama"), tokens()
    results = []
    for order in ("block", "groups"):
        config = watched.config(equalize=True, bits=8, options={"data": samples, "sequential": order})
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
        results.append(watched.seen[0][2]["hessian"])
        watched.seen.clear()
    # Once computed from the sums, once collected anew.
    assert float((results[0] - results[1]).abs().max()) < 1e-5 * float(results[1].abs().max())


def test_norms_that_add_one(watched, tmp_path, tokens):
    import transformers as tf

    config = tf.Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    base = tf.Gemma3ForCausalLM(config)
    for name, parameter in base.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    base.save_pretrained(tmp_path)
    model = equalized(watched, tmp_path, tokens(count=8, length=48))
    # The norm before the attention takes the scales, though its weight is an offset from 1.
    assert not any("q_proj" in name or "gate_proj" in name for name in scaled(model))
    ids = torch.tensor([tokens()[0]])
    wanted = base(ids).logits.detach()
    with torch.no_grad():
        assert float((wanted - model(ids).logits).norm() / wanted.norm()) < 0.05


def test_scales_in_a_layout_survive_saving(watched, tiny, tokens, tmp_path):
    model = equalized(watched, tiny("gpt2"), tokens())
    assert scaled(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([tokens()[0]])
    assert torch.equal(model(ids).logits, again(ids).logits)
