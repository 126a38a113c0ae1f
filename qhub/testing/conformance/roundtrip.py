"""Checks quantize, save, reload in a process that imports only transformers, dequantize, generate, and memory."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qhub.kernels.admission import TOLERANCE
from qhub.layouts import Layout
from qhub.modules import QuantLinear
from qhub.testing.conformance.models import INPUT
from qhub.testing.conformance.processes import run_fresh
from qhub.testing.conformance.subject import KitBase, Subject
from qhub.testing.conformance.workbench import Workbench, bands_of, quantized_weights

__all__ = ["RoundTripChecks"]

# Small enough that every tiny model ends in several files.
_SHARD = "60KB"

# What a user's script looks like: nothing of qhub is imported.
_RELOAD = """
import json, sys
import transformers
import torch
from safetensors.torch import save_file
task = json.loads(sys.argv[1])
torch.set_num_threads(1)
said, logits, ids = {}, {}, torch.tensor(task["input"])
def run(model):
    with torch.no_grad():
        return model.eval()(ids).logits
for folder in task["folders"]:
    try:
        logits[folder] = run(transformers.AutoModelForCausalLM.from_pretrained(folder)).contiguous()
    except Exception as error:
        said[folder] = f"{type(error).__name__}: {error}"
if task["dense"]:
    model = transformers.AutoModelForCausalLM.from_pretrained(task["dense"], quantization_config=task["config"])
    first = run(model)
    model.save_pretrained(task["out"])
    again = transformers.AutoModelForCausalLM.from_pretrained(task["out"])
    said["on_the_fly"] = {
        "kinds": sorted({type(p).__name__ for p in model.parameters()}),
        "same": bool(torch.equal(run(again), first)),
    }
save_file(logits, task["logits"])
print(json.dumps(said))
"""


class RoundTripChecks(KitBase):
    """Uses the method as a user does: ``from_pretrained``, ``save_pretrained``, ``dequantize``, ``generate``."""

    @pytest.fixture
    def reloaded(self, bench: Workbench) -> dict[str, Any]:
        """Return what one fresh process made of every subject's checkpoints, single-file and sharded."""
        return bench.once("reloaded", lambda: self._reload_everything(bench))

    def _reload_everything(self, bench: Workbench) -> dict[str, Any]:
        folders: dict[tuple[Subject, str], Path] = {}
        failures: dict[Subject, Exception] = {}
        for _, subject in self.subjects(every_architecture=True):
            try:
                folders[subject, "one file"] = bench.saved(subject)
                folders[subject, "sharded"] = bench.folder("sharded")
                bench.model(subject).save_pretrained(folders[subject, "sharded"], max_shard_size=_SHARD)
            except Exception as error:
                # Raised again by the tests of this subject; the others go on.
                failures[subject] = error
        out = bench.folder("fresh")
        task: dict[str, Any] = {
            "folders": [str(folder) for folder in folders.values()],
            "input": INPUT.tolist(),
            "dense": str(bench.dense(self.architectures[0])) if self.can_quantize else "",
            "config": bench.values(0) if self.can_quantize else {},
            "out": str(out / "model"),
            "logits": str(out / "logits.safetensors"),
        }
        said = run_fresh(_RELOAD, task)
        return {"folders": folders, "failures": failures, "said": said, "logits": load_file(task["logits"])}

    def _compare(self, subject: Subject, kind: str, reloaded: dict[str, Any], bench: Workbench) -> None:
        if subject in reloaded["failures"]:
            raise reloaded["failures"][subject]
        folder = str(reloaded["folders"][subject, kind])
        assert folder not in reloaded["said"], f"the fresh process could not load it: {reloaded['said'].get(folder)}"
        expected = bench.logits(bench.model(subject))
        found = reloaded["logits"][folder]
        assert torch.equal(found, expected), (
            f"logits differ by up to {float((found - expected).abs().max()):.3e}: not bit-identical"
        )

    def test_reloads_bit_identical_in_a_fresh_process(self, subject: Subject, reloaded: dict, bench: Workbench) -> None:
        """Saved, and loaded by a process that imports only transformers: the same logits, bit by bit."""
        self._compare(subject, "one file", reloaded, bench)

    def test_sharded_save_reloads_bit_identical(self, subject: Subject, reloaded: dict, bench: Workbench) -> None:
        """A checkpoint in several files, where one weight's entries may lie in two of them, loads the same."""
        kind = "*" if bench.container else "*.safetensors"
        files = list(reloaded["folders"][subject, "sharded"].glob(kind)) if not reloaded["failures"] else []
        shards = [file for file in files if file.suffix not in (".json", ".md")]
        assert len(shards) != 1, "the model is too small to be sharded: raise hidden_size"
        self._compare(subject, "sharded", reloaded, bench)

    def test_quantizes_in_a_process_that_imports_only_transformers(self, reloaded: dict) -> None:
        """from_pretrained with a config, save, reload: without `import qhub` anywhere."""
        if not self.can_quantize:
            pytest.skip(f"{self.method} does not quantize")
        said = reloaded["said"]["on_the_fly"]
        assert "QuantizedTensor" in said["kinds"], f"nothing was quantized, the parameters are {said['kinds']}"
        assert said["same"], "logits after saving and reloading differ"

    def test_config_object_and_plain_values_agree(self, config: int, bench: Workbench) -> None:
        """A config object and the plain values of a config.json, given to from_pretrained, mean the same."""
        if not self.can_quantize:
            pytest.skip(f"{self.method} does not quantize")
        from transformers import AutoModelForCausalLM

        architecture = self.architectures[0]
        model: Any = AutoModelForCausalLM.from_pretrained(
            bench.dense(architecture), quantization_config=bench.values(config)
        )
        by_object = bench.model(Subject(config, architecture))
        assert model.hf_quantizer.plan == by_object.hf_quantizer.plan
        configs = [one.config.quantization_config for one in (model, by_object)]
        plain = [one if isinstance(one, dict) else one.to_dict() for one in configs]
        assert plain[0] == plain[1]

    def test_saved_config_is_the_config(self, subject: Subject, bench: Workbench) -> None:
        """config.json of a saved model parses to the config that the model has."""
        stored = json.loads((bench.saved(subject) / "config.json").read_text())["quantization_config"]
        assert stored["quant_method"] == self.method
        if bench.container:
            # Where the weights are is said of the folder, not of the model.
            assert (bench.saved(subject) / stored.pop("gguf_file")).is_file()
        live = bench.model(subject).hf_quantizer.quantization_config.to_dict()
        again = bench.parse(stored).to_dict()
        assert json.dumps(again, sort_keys=True) == json.dumps(live, sort_keys=True)

    def test_dequantize_gives_a_dense_model(self, subject: Subject, bench: Workbench) -> None:
        """model.dequantize() leaves plain layers with the very weights that the quantized ones stood for."""
        model = bench.load(bench.saved(subject))
        expected = bench.logits(model)
        weights = quantized_weights(model)
        stood_for = {name: weight.dequantize(model.dtype).clone() for name, weight in weights.items()}
        bound = _logits_tolerance(weights)
        model.dequantize()
        assert not quantized_weights(model), "quantized weights are left"
        assert not any(isinstance(module, QuantLinear) for module in model.modules()), "quantized layers are left"
        assert not getattr(model.config, "quantization_config", None), "the config still says that it is quantized"
        dense = dict(model.named_parameters())
        for name, value in stood_for.items():
            assert torch.equal(dense[name], value), f"{name} is not what the quantized weight stood for"
        if bound is not None:
            found = bench.logits(model)
            error = float((found - expected).double().norm() / expected.double().norm())
            assert error <= bound, f"logits moved by {error:.2e}, more than kernels may differ ({bound:.2e})"

    def test_logits_are_finite(self, subject: Subject, bench: Workbench) -> None:
        """The quantized model computes numbers."""
        assert bool(torch.isfinite(bench.logits(bench.model(subject))).all())

    def test_generates_with_cache_and_without(self, single: Subject, bench: Workbench) -> None:
        """generate() under no_grad works, and the key/value cache changes no token."""
        model = bench.model(single)
        made = {}
        with torch.no_grad():
            for cache in (True, False):
                made[cache] = model.generate(
                    INPUT, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0
                )
        assert made[True].shape == (1, INPUT.shape[1] + 5)
        rounded = any(w.quant_layout.activation.kind != "none" for w in quantized_weights(model).values())
        # Rounded activations look at a whole batch of rows (outlier columns), so there a token may change.
        assert rounded or torch.equal(made[True], made[False]), (
            f"{made[True].tolist()} with cache, {made[False].tolist()} without"
        )

    def test_takes_less_memory(self, subject: Subject, bench: Workbench) -> None:
        """Packed weights are smaller than the same in 16 bits, and the model's footprint counts them packed.

        Tables and codebooks, whose size does not grow with the matrix, are left out: they are meant for larger ones.
        """
        model = bench.model(subject)
        for name, weight in quantized_weights(model).items():
            growing = [name for prefix, band in bands_of(weight.quant_layout) for name in _growing(prefix, band)]
            packed = sum(weight.parts[part].numel() * weight.parts[part].element_size() for part in growing)
            assert packed < 2 * weight.numel(), (
                f"{name} takes {packed} bytes, in 16 bits it would take {2 * weight.numel()}"
            )
        expected = _bytes(model)
        counted = model.get_memory_footprint(return_buffers=False)
        assert counted == expected, f"get_memory_footprint says {counted}, the tensors take {expected}"

    def test_mixture_of_experts_is_quantized_whole(self, single: Subject, bench: Workbench) -> None:
        """Fused experts, most of a mixture's bytes, are quantized and not left in 16 bits; or the report says why."""
        mixtures = [name for name in self.architectures if name in ("qwen3_moe", "mixtral")]
        if single.config is None or not mixtures:
            pytest.skip("no mixture of experts among the architectures")
        model = bench.model(Subject(single.config, mixtures[0]))
        sizes: dict[bool, int] = defaultdict(int)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3:
                sizes[name in model.hf_quantizer.plan] += parameter.numel()
                assert name in model.hf_quantizer.plan or model.hf_quantizer.skipped.get(name), (
                    f"{name} is dense, without a reason"
                )
        assert sizes[True] or sizes[False], "the model has no fused experts"
        if not sizes[True]:
            reasons = sorted({r for n, r in model.hf_quantizer.skipped.items() if "experts" in n})
            pytest.skip(f"{self.method} leaves experts dense: {reasons}")


def _growing(prefix: str, layout: Layout) -> list[str]:
    """Return the parts of ``layout`` that are larger for a matrix of more rows, under ``prefix``."""
    larger = layout.with_rows(2 * layout.out_features).part_specs()
    return [f"{prefix}{name}" for name, spec in layout.part_specs().items() if larger[name].shape != spec.shape]


def _bytes(model: Any) -> int:
    weights = quantized_weights(model)
    packed = sum(weight.nbytes for weight in weights.values())
    return packed + sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in weights)


def _logits_tolerance(weights: dict[str, Any]) -> float | None:
    """Return how far logits may lie from the dequantized model's: what kernels may, summed; None for rounded inputs."""
    total = 0.0
    for weight in weights.values():
        if weight.quant_layout.activation.kind != "none":
            return None
        total += TOLERANCE[weight.compute_dtype or weight.dtype]
    return total
