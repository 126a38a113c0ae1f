"""Optimizing holds no weight twice, changes no file, and notices what happens to weights afterwards."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig

import qhub
from qhub import QuantizedTensor
from qhub.decoding.joining import Joined, pointers
from qhub.decoding.optimizing import _decoders
from qhub.kernels.arranging import arrange

from .test_generate import both, prompt, ran_in_steps

METHODS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False),
    "nf4 nested": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "hqq": {"quant_method": "hqq", "nbits": 4, "group_size": 16, "axis": 1},
}


@pytest.fixture
def quantized(make, tmp_path):
    def load(method: str, kind: str = "qwen2") -> torch.nn.Module:
        make(kind).save_pretrained(tmp_path / kind)
        config = METHODS[method]
        if isinstance(config, dict):
            config = HqqConfig(**{k: v for k, v in config.items() if k != "quant_method"})
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / kind, quantization_config=config, dtype=torch.float32
        ).eval()

    return load


def storages(model: torch.nn.Module) -> int:
    """Return the bytes of all memory that the quantized weights lie in."""
    found = {}
    for parameter in model.parameters():
        if isinstance(parameter, QuantizedTensor):
            for part in parameter.parts.values():
                found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("method", list(METHODS))
def test_quantized_models(quantized, method):
    model = quantized(method)
    before = storages(model)
    plain, fast = both(model, prompt(2))
    assert torch.equal(plain, fast)
    assert ran_in_steps(model)
    joined = _decoders[model].joined
    if method != "nf4 nested":
        # Biases and weights: q, k, v and gate, up of three layers.
        assert len(joined) == 6
        assert all(part.product.weight.shape[0] == sum(m.out_features for m in part.layers) for part in joined.values())
    assert storages(model) <= before


def test_weights_in_tiles_are_joined_in_tiles(make, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
    make("llama", **sizes).save_pretrained(tmp_path / "dense")
    config = HqqConfig(nbits=4, group_size=64, axis=1)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.float32
    ).eval()
    wanted = model.generate(**prompt(2), max_new_tokens=20, do_sample=False)
    assert arrange(model, forced=True) == 21
    before = storages(model)
    qhub.optimize(model)
    assert torch.equal(model.generate(**prompt(2), max_new_tokens=20, do_sample=False), wanted)
    joined = [member.product.weight.quant_layout for member in _decoders[model].joined.values()]
    assert [(layout.kind, layout.out_features) for layout in joined] == [("tiled", 256), ("tiled", 384)] * 3
    assert storages(model) <= before


def test_saving_is_as_before(quantized, tmp_path):
    model = quantized("nf4")
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    qhub.optimize(model)
    model.generate(**prompt(), max_new_tokens=3)
    found = model.state_dict()
    assert list(found) == list(wanted)
    for name, value in found.items():
        assert type(value) is type(wanted[name]), name
        both_parts = (v.dequantize() if isinstance(v, QuantizedTensor) else v for v in (value, wanted[name]))
        assert torch.equal(*both_parts), name
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()


def test_dense_weights_become_views(make, tmp_path):
    model = make("llama")
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "before")
    qhub.optimize(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert len({p.untyped_storage().data_ptr() for p in model.model.layers[0].mlp.parameters()}) == 2
    model.save_pretrained(tmp_path / "after")
    file = "model.safetensors"
    assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
    again = copy.deepcopy(model)
    assert again not in _decoders
    assert pickle.loads(pickle.dumps(model)) not in _decoders
    assert torch.equal(again.generate(**prompt(), do_sample=False), model.generate(**prompt(), do_sample=False))


def test_a_model_that_nobody_holds_is_freed(make):
    model = make("llama")
    both(model, prompt())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_layers_that_do_not_stack_stay_apart():
    first, second = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4, bias=False)
    assert Joined.of([first, second]) is None
    assert Joined.of([first, first]) is None
    second = torch.nn.Linear(8, 4)
    second.register_forward_hook(lambda *_: None)
    assert Joined.of([first, second]) is None
    third = torch.nn.Linear(8, 2)
    x = torch.randn(3, 8)
    wanted = torch.cat([first(x), third(x)], -1)
    joined = Joined.of([first, third])
    torch.testing.assert_close(joined(x), wanted)
    assert pointers(first.weight) == pointers(joined.weight)
    with torch.no_grad():
        first.weight.add_(1)
        third.bias.add_(1)
    torch.testing.assert_close(joined(x), torch.cat([first(x), third(x)], -1))


def test_weights_changed_in_place_and_replaced(make):
    model = make("llama")
    plain, fast = both(model, prompt())
    assert torch.equal(plain, fast)
    (old,) = _decoders[model].steps.values()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    changed = model.generate(**prompt(), max_new_tokens=30, do_sample=False)
    assert list(_decoders[model].steps.values()) == [old]
    qhub.optimize(model, False)
    assert torch.equal(changed, model.generate(**prompt(), max_new_tokens=30, do_sample=False))
    _decoders.pop(model)
    qhub.optimize(model)
    model.generate(**prompt(), max_new_tokens=30, do_sample=False)
    torch.manual_seed(3)
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 64, bias=False)
    changed = model.generate(**prompt(), max_new_tokens=30, do_sample=False)
    assert old not in _decoders[model].steps.values()
    qhub.optimize(model, False)
    assert torch.equal(changed, model.generate(**prompt(), max_new_tokens=30, do_sample=False))


@pytest.mark.parametrize("method", [None, "nf4"])
def test_adapters(make, quantized, method):
    peft = pytest.importorskip("peft")
    base = make("llama") if method is None else quantized(method, "llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).eval()
    arguments = {**prompt(), "max_new_tokens": 25, "do_sample": False}
    wanted = model.generate(**arguments)
    with model.disable_adapter():
        bare = model.generate(**arguments)
    assert not torch.equal(wanted, bare)
    qhub.optimize(model)
    host = model.get_base_model()
    assert torch.equal(model.generate(**arguments), wanted)
    assert ran_in_steps(host)
    with model.disable_adapter():
        assert torch.equal(model.generate(**arguments), bare)
    assert torch.equal(model.generate(**arguments), wanted)
    model.merge_adapter()
    merged = model.generate(**arguments)
    qhub.optimize(model, False)
    assert torch.equal(model.generate(**arguments), merged)
    model.unmerge_adapter()
    assert torch.equal(model.generate(**arguments), wanted)
