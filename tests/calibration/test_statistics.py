"""The statistics a method gets are those of the layer's own inputs, whatever the model and however gathered."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM


def inputs_of(folder, name, samples):
    """Return the inputs of the layer ``name`` of the unquantized model, (tokens, K) float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda m, args: found.append(args[0].reshape(-1, args[0].shape[-1])))
    for sample in samples:
        model(torch.tensor([sample]))
    return torch.cat(found)


def close(a, b):
    # Sums of n float32 products: n * 2^-24 relative to the sum of magnitudes at worst; here n is a few hundred, and the
    # activations themselves come from a float32 forward pass of a few layers.
    assert float((a.double() - b).abs().max().detach()) < 1e-4 * float(b.abs().max().detach())


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_they_are_those_of_the_first_block(watched, tiny, tokens, architecture):
    folder, samples = tiny(architecture), tokens()
    config = watched.config(options={"data": samples, "sequential": "block", "batch_size": 4})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    _, _, statistics = watched.seen[0]
    name = next(n for n, _ in model.named_modules() if n.endswith(("q_proj", "c_attn")))
    x = inputs_of(folder, name, samples)
    close(statistics["hessian"], x.T @ x / len(x))
    close(statistics["mean_abs"], x.abs().mean(0))
    assert int(statistics["tokens"]) == len(x) == 6 * 24


def test_later_inputs_come_from_the_quantized_model(watched, tiny, tokens):
    folder, samples = tiny("llama"), tokens()
    config = watched.config(bits=3, options={"data": samples})
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    report = quantized.hf_quantizer.calibration
    last = [layer.name for layer in report.layers].index("model.layers.1.mlp.down_proj.weight")
    found = watched.seen[last][2]["hessian"]
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    x = inputs_of(folder, "model.layers.1.mlp.down_proj", samples)
    float_one = x.T @ x / len(x)
    # The same, with all weights but the last replaced by the quantized ones.
    for name, parameter in dense.named_parameters():
        if name in quantized.hf_quantizer.plan:
            parameter.data.copy_(quantized.get_parameter(name).dequantize(torch.float32))
    seen = []
    dense.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    for sample in samples:
        dense(torch.tensor([sample]))
    x = torch.cat(seen)
    close(found, x.T @ x / len(x))
    assert float((found - float_one).norm()) > 0.02 * float(float_one.norm())


def test_cross_relates_the_two_streams(watched, tiny, tokens):
    folder, samples = tiny("llama"), tokens()
    config = watched.config(bits=3, statistics=("hessian", "cross"), options={"data": samples})
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    first, later = watched.seen[0][2], watched.seen[-1][2]
    close(first["cross"], first["hessian"].double())
    assert float((later["cross"] - later["hessian"]).norm()) > 0.01 * float(later["hessian"].norm())
    x = inputs_of(folder, "model.layers.1.mlp.down_proj", samples)
    # Cauchy and Schwarz: the diagonal is bounded by the two streams' own.
    bound = (x.square().mean(0) * later["hessian"].diagonal().double()).sqrt()
    assert bool((later["cross"].diagonal().abs().double() <= bound * (1 + 1e-4)).all())


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe"])
def test_each_expert_has_its_own(watched, tiny, tokens, architecture):
    samples = tokens(count=8, length=64)
    config = watched.config(statistics=("hessian",), options={"data": samples, "min_tokens": 1})
    model = AutoModelForCausalLM.from_pretrained(tiny(architecture), quantization_config=config)
    layers = {layer.name: layer for layer in model.hf_quantizer.calibration.layers}
    counts = [layers[f"model.layers.0.mlp.experts.gate_up_proj[{e}]"].tokens for e in range(4)]
    # Each token goes to two of the four experts.
    assert sum(counts) == 2 * 8 * 64 and len(set(counts)) > 1
    assert [layers[f"model.layers.0.mlp.experts.down_proj[{e}]"].tokens for e in range(4)] == counts
    assert all(one.error is not None and one.error < 1e-3 for one in layers.values())


def test_an_expert_with_too_few_tokens_is_reported(watched, tiny, tokens):
    config = watched.config(statistics=("hessian",), options={"data": tokens(count=1, length=40), "min_tokens": 30})
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), quantization_config=config)
    report = model.hf_quantizer.calibration
    poor = [one for one in report.layers if "[" in one.name and one.tokens == 0]
    assert poor and all(any(one.name in warning for warning in report.warnings) for one in poor)
    neutral = [s for _, _, s in watched.seen if int(s["tokens"]) == 0]
    assert torch.equal(neutral[0]["hessian"], torch.eye(neutral[0]["hessian"].shape[0]))


def test_layers_with_one_input_come_as_one_tall_matrix(watched, tiny, tokens):
    folder, samples = tiny("llama"), tokens()
    models = []
    for together in (True, False):
        config = watched.config(together=together, options={"data": samples})
        models.append(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))
        if together:
            # q (64 rows), k and v (32 each).
            assert [tuple(w.shape) for w, _, _ in watched.seen[:2]] == [(128, 64), (64, 64)]
    for (name, a), (_, b) in zip(models[0].state_dict().items(), models[1].state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_where_activations_lie_changes_nothing(watched, tiny, tokens, place, tmp_path):
    outputs = []
    for where in ("device", place):
        options = {"data": tokens(), "place": where, "batch_size": 2, "scratch": tmp_path}
        config = watched.config(options=options)
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config)
        outputs.append(model(torch.arange(3, 40)[None]).logits)
    assert torch.equal(*outputs)
    assert not list(tmp_path.iterdir())


def test_a_model_in_bfloat16_keeps_its_dtypes(watched, tiny, tokens):
    config = watched.config(options={"data": tokens()})
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16, quantization_config=config)
    before = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16)
    for name, parameter in before.named_parameters():
        now = model.get_parameter(name)
        assert now.dtype == torch.bfloat16
        if name not in model.hf_quantizer.plan:
            assert torch.equal(now, parameter)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "opt"])
def test_remembered_products_change_nothing(watched, tiny, tokens, architecture, monkeypatch):
    from qhub.calibration import block

    data = tokens(count=8, length=64)
    results = []
    for limit in (None, 0, 3 * 8 * 64 * 64 * 4):
        if limit is not None:
            # Nothing is remembered, or some of it.
            monkeypatch.setattr(block, "budget", lambda device, limit=limit: limit)
        config = watched.config(bits=3, options={"data": data, "min_tokens": 1, "batch_size": 2})
        model = AutoModelForCausalLM.from_pretrained(tiny(architecture), quantization_config=config)
        results.append([layer.error for layer in model.hf_quantizer.calibration.layers])
    assert results[0] == results[1] == results[2]


def test_no_block_keeps_products_after_it_is_done(watched, tiny, tokens, monkeypatch):
    import weakref

    from qhub.calibration.memory import ProductMemory

    kept = []
    before = ProductMemory.run

    def run(self, number):
        kept.append((weakref.ref(self), len(self.kept)))
        return before(self, number)

    monkeypatch.setattr(ProductMemory, "run", run)
    import gc

    gc.disable()
    try:
        config = watched.config(options={"data": tokens()})
        AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config)
        assert max(count for _, count in kept) > 0
        assert all(memory() is None for memory, _ in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_magnitudes_are_maxima_over_all_batches(dtype):
    from qhub.calibration.statistics import Sums

    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = Sums(["max_abs", "mean_abs"], 8, torch.device("cpu"))
    for batch in (x[:4], x[4:20], x[:0], x[20:]):
        sums.add(batch)
    values = sums.means()
    assert torch.equal(values["max_abs"], x.abs().amax(0).float())
    assert int(values["tokens"]) == 30


def test_the_largest_magnitudes_of_a_model_are_those_of_its_inputs(watched, tiny, tokens):
    folder, samples = tiny("llama"), tokens()
    config = watched.config(statistics=("max_abs",), options={"data": samples, "sequential": "block", "batch_size": 4})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    name = next(n for n, _ in model.named_modules() if n.endswith("q_proj"))
    close(watched.seen[0][2]["max_abs"], inputs_of(folder, name, samples).abs().amax(0))


def test_maxima_follow_a_scaled_input_and_say_nothing_where_nothing_was_seen():
    from qhub.calibration.statistics import neutral, rescaled

    factor = torch.tensor([2.0, 0.5])
    assert rescaled({"max_abs": torch.tensor([1.0, 4.0])}, factor)["max_abs"].tolist() == [2.0, 2.0]
    assert neutral(["max_abs"], 2, torch.device("cpu"))["max_abs"].tolist() == [1.0, 1.0]


def test_maxima_are_taken_over_all_processes(tmp_path):
    import subprocess
    import sys

    program = f"""
import sys, torch, torch.distributed as dist
from qhub.calibration.sharing import reduce_sums
from qhub.calibration.statistics import Sums
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path / "store"}", rank=rank, world_size=2)
sums = Sums(["max_abs", "mean_abs"], 2, torch.device("cpu"))
sums.add(torch.tensor([[1.0, -5.0]]) if rank == 0 else torch.tensor([[-3.0, 2.0], [1.0, 1.0]]))
reduce_sums(sums)
values = sums.means()
assert values["max_abs"].tolist() == [3.0, 5.0], values
assert torch.allclose(values["mean_abs"], torch.tensor([5.0, 8.0]) / 3), values
assert int(values["tokens"]) == 3
# Without it a process may end while a thread of the group still runs, and abort.
dist.destroy_process_group()
"""
    running = [subprocess.Popen([sys.executable, "-c", program, str(rank)]) for rank in range(2)]
    assert [one.wait(120) for one in running] == [0, 0]
