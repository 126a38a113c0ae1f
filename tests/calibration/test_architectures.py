"""No table of architectures: encoders and decoders, towers, experts, shared layers, layers outside any block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

SMALL: dict[str, Any] = dict(vocab_size=128, num_hidden_layers=2, num_attention_heads=4, hidden_size=64)


def t5() -> tuple[Any, list[dict[str, Any]]]:
    config = tf.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    ids = torch.randint(3, 128, (6, 20))
    samples = [{"input_ids": one[None], "decoder_input_ids": one[None, :12]} for one in ids]
    return tf.T5ForConditionalGeneration(config), samples


def whisper() -> tuple[Any, list[dict[str, Any]]]:
    config = tf.WhisperConfig(
        vocab_size=128, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=20,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    samples = [
        {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": torch.randint(3, 128, (1, 12))} for _ in range(6)
    ]
    return tf.WhisperForConditionalGeneration(config), samples


def llava() -> tuple[Any, list[dict[str, Any]]]:
    vision = tf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = tf.LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=127, vision_feature_layer=-1)
    samples = []
    for _ in range(6):
        ids = torch.cat([torch.full((1, 4), 127), torch.randint(3, 120, (1, 12))], dim=1)
        samples.append({"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)})
    return tf.LlavaForConditionalGeneration(config), samples


def causal(config: Any) -> tuple[Any, list[dict[str, Any]]]:
    ids = torch.randint(3, 120, (6, 40))
    return tf.AutoModelForCausalLM.from_config(config), [{"input_ids": one[None]} for one in ids]


CASES = {
    "t5": t5,
    "whisper": whisper,
    "llava": llava,
    "opt": lambda: causal(
        tf.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=32, max_position_embeddings=64)
    ),
    "qwen3-moe": lambda: causal(
        tf.Qwen3MoeConfig(
            **SMALL, intermediate_size=96, num_key_value_heads=2, moe_intermediate_size=64, num_experts=4,
            num_experts_per_tok=2, head_dim=16,
        )
    ),
    "gemma3": lambda: causal(
        tf.Gemma3TextConfig(**SMALL, intermediate_size=96, num_key_value_heads=2, head_dim=16, sliding_window=16)
    ),
}  # fmt: skip


@pytest.fixture
def folder(request, tmp_path):
    torch.manual_seed(0)
    model, samples = CASES[request.param]()
    model.eval().save_pretrained(tmp_path)
    return tmp_path, type(model), samples


@pytest.mark.parametrize("folder", CASES, indirect=True)
@pytest.mark.parametrize("equalize", [False, True], ids=["plain", "equalized"])
def test_every_layer_is_reached_and_rounds_little(watched, folder, equalize, tmp_path):
    path, cls, samples = folder
    config = watched.config(equalize=equalize, options={"data": samples, "min_tokens": 1})
    model = cls.from_pretrained(path, quantization_config=config, dtype=torch.float32)
    report = model.hf_quantizer.calibration
    base = cls.from_pretrained(path, dtype=torch.float32)
    assert all(layer.tokens > 0 for layer in report.layers), [one for one in report.layers if not one.tokens]
    assert len(model.hf_quantizer.plan) == len({layer.name.split("[")[0] for layer in report.layers})
    with torch.no_grad():
        wanted, found = base(**samples[0]).logits, model(**samples[0]).logits
    assert float((wanted - found).norm() / wanted.norm()) < 0.05
    model.save_pretrained(tmp_path / "out")
    again = cls.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(**samples[0]).logits, found)


@pytest.mark.parametrize("folder", ["t5", "llava"], indirect=True)
def test_inputs_of_the_last_decoder_block_are_those_of_the_whole_model(watched, folder):
    """What the engine hands a block is what the model itself would: masks, biases, the encoder's output."""
    path, cls, samples = folder
    # 8 bits in the first pass, so that what is compared differs by rounding only.
    config = watched.config(options={"data": samples, "sequential": "block"})
    model = cls.from_pretrained(path, quantization_config=config, dtype=torch.float32)
    plan = list(model.hf_quantizer.plan)
    last = next(name for name in reversed(plan) if name.endswith(("q.weight", "q_proj.weight", "o_proj.weight")))
    number = [layer.name for layer in model.hf_quantizer.calibration.layers].index(last)
    seen = []
    module = model.get_submodule(last.removesuffix(".weight"))
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().flatten(0, -2)))
    for sample in samples:
        model(**sample)
    x = torch.cat(seen).double()
    hessian = x.T @ x / len(x)
    found = watched.seen[number][2]["hessian"].double()
    # Within one block the weights before this layer were not quantized yet: 8 bits make a percent or so.
    assert float((found - hessian).norm() / hessian.norm()) < 0.05


def test_a_layer_outside_the_blocks_comes_last(watched, tmp_path, tokens):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2))
    config = watched.config(modules_to_not_convert=[], options={"data": tokens()})
    model.save_pretrained(tmp_path)
    quantized = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    # The output head lies in no block: it is calibrated at the end, on the quantized model's last hidden states.
    layers = {layer.name: layer for layer in quantized.hf_quantizer.calibration.layers}
    assert list(layers)[-1] == "lm_head.weight"
    assert layers["lm_head.weight"].tokens == 6 * 24
    assert layers["lm_head.weight"].error < 1e-3


def test_a_block_that_stands_in_two_places_is_quantized_once(watched, tokens):
    import qhub

    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 3}, intermediate_size=96, num_key_value_heads=2)
    model = tf.LlamaForCausalLM(config).eval()
    model.model.layers[2] = model.model.layers[0]
    ids = torch.tensor(tokens())
    with torch.no_grad():
        wanted = model(ids).logits
    qhub.quantize(model, watched.config(), data=tokens())
    names = [layer.name for layer in model.hf_quantizer.calibration.layers]
    assert len(names) == len(set(names)) == 14
    with torch.no_grad():
        found = model(ids).logits
    assert float((wanted - found).norm() / wanted.norm()) < 0.05
