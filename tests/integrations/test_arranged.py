"""Models whose weights were arranged for a kernel: whatever is done with a model gives what it gives without."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, HqqConfig

from qhub.kernels.arranging import arrange
from qhub.layouts.tiled import Tiled
from qhub.tensor import QuantizedTensor

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def folder(path, kind, **more):
    """Save a tiny model of ``kind`` with random weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Return a folder with a quantized Llama."""
    base = folder(tmp_path_factory.mktemp("base"), "llama")
    config = HqqConfig(nbits=4, group_size=32, axis=1)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    out = tmp_path_factory.mktemp("quantized")
    model.save_pretrained(out)
    return out


def weights(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def logits(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(1, 96, (2, 9))).logits


def near(one, other):
    """Return whether results differ by no more than sums of another kernel in another order do."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def loaded(path, arranged):
    model = AutoModelForCausalLM.from_pretrained(path)
    if arranged:
        assert arrange(model, forced=True) == len(weights(model)) == 14
        assert all(isinstance(weight.quant_layout, Tiled) for weight in weights(model).values())
        assert arrange(model, forced=True) == 0
    return model


def test_is_left_alone_where_no_kernel_asks_for_it(quantized):
    if torch.cuda.is_available():
        pytest.skip("a GPU's kernels may ask")
    assert arrange(loaded(quantized, False)) == 0


def test_says_that_products_in_float32_are_slow(quantized, monkeypatch, caplog):
    monkeypatch.setattr("qhub.kernels.arranging._chosen", lambda *given: False)
    model = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16)
    for weight in list(weights(model).values())[:3]:
        weight.compute_dtype = torch.float32
    # Where no kernel is for tiles anyway nothing is lost.
    arrange(model)
    assert "float32" not in caplog.text
    monkeypatch.setattr("qhub.kernels.arranging._offered", lambda devices: True)
    arrange(model)
    assert "3 of 14 quantized weights are multiplied in float32" in caplog.text and "bfloat16" in caplog.text


def test_computes_and_saves_the_same(quantized, tmp_path):
    plain, arranged = loaded(quantized, False), loaded(quantized, True)
    assert near(logits(plain), logits(arranged))
    plain.save_pretrained(tmp_path / "plain")
    arranged.save_pretrained(tmp_path / "arranged")
    for one in sorted((tmp_path / "plain").iterdir()):
        assert one.read_bytes() == (tmp_path / "arranged" / one.name).read_bytes(), one.name
    # Saving left the weights as they were.
    assert all(isinstance(weight.quant_layout, Tiled) for weight in weights(arranged).values())


def test_fused_experts_compute_and_save_the_same(tmp_path):
    base = folder(tmp_path / "base", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    config = HqqConfig(nbits=4, group_size=32, axis=1)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model.save_pretrained(tmp_path / "plain")
    expected = logits(model)
    assert arrange(model, forced=True)
    assert any(w.ndim == 3 and isinstance(w.quant_layout, Tiled) for w in weights(model).values())
    assert near(logits(model), expected)
    model.save_pretrained(tmp_path / "arranged")
    for one in sorted((tmp_path / "plain").glob("*.safetensors")):
        assert one.read_bytes() == (tmp_path / "arranged" / one.name).read_bytes(), one.name


def test_copies_pickles_and_casts(quantized):
    model = loaded(quantized, True)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    weight = model.model.layers[0].mlp.up_proj.weight
    again = pickle.loads(pickle.dumps(weight))
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert isinstance(weight.to(torch.bfloat16).quant_layout, Tiled)
    assert not isinstance(weight.to("meta").quant_layout, Tiled)


def test_adapters_merge_and_come_out_again_as_on_plain_weights(quantized):
    peft = pytest.importorskip("peft")
    found = []
    for arranged in (False, True):
        model = loaded(quantized, arranged)
        before = {name: weight.dequantize() for name, weight in weights(model).items()}
        torch.manual_seed(2)
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        tuned.merge_adapter()
        merged = logits(tuned)
        if arranged:
            # What was merged in one order of codes comes out in it, whatever became of the weights in between.
            arrange(model, forced=True)
        tuned.unmerge_adapter()
        after = {
            name.replace("base_model.model.", "").replace(".base_layer", ""): weight
            for name, weight in weights(tuned).items()
        }
        assert all(torch.equal(after[name].dequantize(), weight) for name, weight in before.items())
        found.append(merged)
    assert near(found[0], found[1])


def test_an_adapter_merged_before_arranging_comes_out_after(quantized):
    peft = pytest.importorskip("peft")
    model = loaded(quantized, False)
    expected = logits(model)
    torch.manual_seed(2)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.merge_adapter()
    assert arrange(model, forced=True)
    tuned.unmerge_adapter()
    with tuned.disable_adapter():
        assert near(logits(tuned), expected)


def test_gradients_and_compiled_products(quantized):
    plain, arranged = (loaded(quantized, which).model.layers[0].mlp.up_proj for which in (False, True))
    x = torch.randn(3, 64)
    grads = []
    for layer in (plain, arranged):
        own = x.clone().requires_grad_()
        layer(own).square().sum().backward()
        grads.append(own.grad)
    assert near(grads[0], grads[1])
    compiled = torch.compile(arranged, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert near(compiled(x), plain(x))
