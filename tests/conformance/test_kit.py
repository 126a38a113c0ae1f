"""The kit itself: a plugin that breaks one invariant fails the test of that invariant, and for that reason."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from qhub.integrations.transformers import install
from qhub.kernels import dispatch
from qhub.registry import registry

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/third_party_plugin/pow2_quant/__init__.py"

TESTS = """
from qhub.testing import MethodConformance

class TestBroken(MethodConformance):
    method = {name!r}
    configs = [dict(group_size=32)]
    bad_configs = [dict(group_size=0)]
    native_packages = ("broken_native",)
    architectures = ("llama",)
    hidden_size = 64
    {more}
"""


_counter = itertools.count()


@dataclass
class Outcomes:
    """Collects what an inner pytest run reports, by the test's name without its parameters."""

    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        if report.failed:
            self.failed[name] = str(report.longrepr)
        elif report.skipped:
            self.skipped[name] = str(report.longrepr)
        elif report.when == "call":
            self.passed.add(name)


def run_kit(folder: Path, name: str, tests: str, more: str = "") -> Outcomes:
    """Run those tests of the kit that the expression ``tests`` picks on the method ``name``."""
    # A name of its own: Python keeps a test module that it has imported once.
    file = folder / f"test_{name}_{next(_counter)}.py"
    file.write_text(TESTS.format(name=name, more=more))
    (folder / "pytest.ini").write_text("[pytest]\n")
    outcomes = Outcomes()
    apart = ["-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "--basetemp", str(folder / "inner")]
    quiet = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--import-mode=importlib"]
    pytest.main([str(file), "-k", tests, *apart, *quiet], plugins=[outcomes])
    assert outcomes.failed or outcomes.passed or outcomes.skipped, "the inner run collected nothing"
    return outcomes


@pytest.fixture
def make_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """A function that installs the example plugin with changes to its source, under a name of its own."""
    made: list[str] = []

    def make(*changes: tuple[str, str], head: str = "", tail: str = "") -> str:
        name = f"broken_{tmp_path.name.rstrip('0123456789').replace('-', '_').lower()[-20:]}_{len(made)}"
        source = EXAMPLE.read_text().replace(
            'quant_method: ClassVar[str] = "pow2"', f'quant_method: ClassVar[str] = "{name}"'
        )
        for old, new in changes:
            assert source.count(old) >= 1, f"the example plugin has no {old!r} any more: adapt this test"
            source = source.replace(old, new)
        package = tmp_path / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"{head}\n{source}\n{tail}\n")
        metadata = tmp_path / "site" / f"{name}-0.1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (metadata / "entry_points.txt").write_text(f"[qhub.plugins]\n{name} = {name}\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        # Fresh processes must find it too.
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        registry.refresh()
        dispatch.forget()
        install()
        made.append(name)
        return name

    yield make
    for name in made:
        registry.unregister(name)
    monkeypatch.undo()
    registry.refresh()
    dispatch.forget()


def test_intact_plugin_passes(make_plugin, tmp_path):
    """The copy that the other tests break passes what they fail."""
    name = make_plugin()
    outcomes = run_kit(tmp_path, name, "not fresh and not lora and not sharded and not process")
    assert outcomes.failed == {}
    assert len(outcomes.passed) > 35
    assert outcomes.skipped.keys() <= {"test_mixture_of_experts_is_quantized_whole"}


@dataclass
class Broken:
    """Says how to break the example plugin, which test of the kit must fail then, and a part of what it says.

    ``changes``: (old, new) pieces of its source. ``head``, ``tail``: put around it. ``more``: for the kit's class.
    """

    test: str
    says: str
    changes: tuple[tuple[str, str], ...] = ()
    head: str = ""
    tail: str = ""
    more: str = ""


FIELD = "    group_size: int = 32\n"
SCALES_READ = '"scales": entries["pow2_scales"],'
SCALES_WRITTEN = '"pow2_scales": parts["scales"]}'
# The example's qhub_quantize returns layout.encode(...); these two turn that into spoil(weight, layout.encode(...)).
SPOIL = (("return layout.encode(", "return spoil(weight, layout.encode("), (', grid="refit")', ', grid="refit"))'))

IMPORTS_NATIVE = """
try:
    import broken_native
except ImportError:
    broken_native = None
"""

FORGETFUL = """
    def to_dict(self):
        return {"quant_method": self.quant_method}
"""

LOOSE_SPEC = """
class LooseSpec(ConfigSpec):
    def parse(self, values):
        return super().parse({key: values[key] for key in values if key in self.known_keys()})
"""

PLANS_BY_CHANCE = """
    size = config.group_size if next(COUNTER) % 2 else 2 * config.group_size
    for weight in weights:
        shape = dict(out_features=weight.out_features, in_features=weight.in_features)
        plan[weight.name] = LayerPlan(Lookup(**shape, grid=Grid.along_k(size)))
    return plan
"""

KEEPS_SCALES = """
        key = bytes(parts["qweight"].flatten().tolist())
        KEPT[key] = parts["scales"]
        return {"pow2_codes": parts["qweight"], "pow2_scales": torch.ones_like(parts["scales"])}
"""

WRONG_FOR_MANY_ROWS = """
from qhub.kernels import KernelSpec, reference

def product(x, layout, parts, bias=None):
    y = reference.linear(x, layout, parts, bias)
    return y * 1.01 if len(x) > 3 else y

@hookimpl
def qhub_kernels():
    return [KernelSpec(name="many-rows-wrong", impl=f"{__name__}:product", layout="lookup", rank=100_000)]
"""

BROKEN = {
    "native import": Broken("test_entry_module_is_light", "broken_native", head=IMPORTS_NATIVE),
    "misspelled hook": Broken(
        "test_loads_alone", "qhub_quantise", changes=(("def qhub_quantize(", "def qhub_quantise("),)
    ),
    "unmarked hook": Broken("test_no_hook_is_left_unmarked", "qhub_doctor", tail="def qhub_doctor():\n    return []"),
    "any value is fine": Broken(
        "test_bad_config_is_refused",
        "",
        changes=(("self.group_size < 1", "False"), ("weight.in_features % config.group_size", "False")),
    ),
    "config forgets a value": Broken(
        "test_config_round_trip",
        "lose something",
        changes=((FIELD, FIELD + FORGETFUL),),
        more="configs = [dict(group_size=16)]",
    ),
    "unknown keys are dropped": Broken(
        "test_unknown_key_is_refused",
        "DID NOT RAISE",
        changes=(("return ConfigSpec(", "return LooseSpec("),),
        tail=LOOSE_SPEC,
    ),
    "plan by chance": Broken(
        "test_plan_needs_no_data",
        "two calls of qhub_plan",
        changes=(("    plan = {}\n", "    plan = {}\n" + PLANS_BY_CHANCE),),
        head="import itertools\nCOUNTER = itertools.count(1)",
    ),
    "weight left out in silence": Broken(
        "test_every_weight_is_quantized_or_explained",
        "q_proj",
        changes=(("    return plan\n", '    return {k: v for k, v in plan.items() if "q_proj" not in k}\n'),),
    ),
    "part of another dtype": Broken(
        "test_quantizing_gives_what_was_planned",
        "'scales' has dtype torch.float64",
        changes=SPOIL,
        head="spoil = lambda weight, parts: {**parts, 'scales': parts['scales'].double()}",
    ),
    "writes into the weight": Broken(
        "test_quantizing_gives_what_was_planned",
        "wrote into the weight",
        changes=SPOIL,
        head="spoil = lambda weight, parts: [weight.clamp_(-0.02, 0.02), parts][1]",
    ),
    "zeros become NaN": Broken(
        "test_odd_weights_stay_finite",
        "NaN",
        changes=SPOIL,
        head="spoil = lambda weight, parts: {**parts, 'scales': parts['scales'] / (weight.abs().max() > 0)}",
    ),
    "scales rounded in the file": Broken(
        "test_pack_and_unpack_are_exact",
        "'scales' comes back different",
        changes=((SCALES_WRITTEN, '"pow2_scales": parts["scales"].half().float()}'),),
    ),
    "entry not declared": Broken(
        "test_entries_are_as_declared", "pow2_scales", changes=(('"pow2_scales": Entry(', '"pow2_other": Entry('),)
    ),
    "NaN repaired in silence": Broken(
        "test_impossible_number",
        "replaced in silence",
        changes=((SCALES_READ, '"scales": entries["pow2_scales"].nan_to_num(),'),),
    ),
    "missing scales made up": Broken(
        "test_missing_entry",
        "it loads, in silence, as another weight",
        changes=(
            ('specs["scales"].dtypes)', 'specs["scales"].dtypes, False)'),
            (SCALES_READ, '"scales": entries.get("pow2_scales", torch.ones(layout.scale_shape)),'),
        ),
    ),
    "longer tensors cut": Broken(
        "test_wrong_shape",
        "a model was returned",
        changes=(
            ('Entry(specs["scales"].shape,', "Entry(None,"),
            (SCALES_READ, '"scales": entries["pow2_scales"][: layout.out_features],'),
        ),
    ),
    "kernel wrong for many rows": Broken("test_every_layer_matches_float64", "M=17", tail=WRONG_FOR_MANY_ROWS),
    "more bytes than before": Broken(
        "test_takes_less_memory", "in 16 bits it would take", more="configs = [dict(group_size=1)]"
    ),
    "noise above the floor": Broken(
        "test_quantizing_gives_what_was_planned", "asks for 99.0 dB", more="min_sqnr = {0: 99.0}"
    ),
    # In this process a reload finds the scales; only a fresh one shows that the file lacks them.
    "scales kept in the process": Broken(
        "test_reloads_bit_identical_in_a_fresh_process",
        "not bit-identical",
        changes=(
            ('return {"pow2_codes": parts["qweight"], ' + SCALES_WRITTEN, KEEPS_SCALES.strip()),
            (
                SCALES_READ,
                '"scales": KEPT.get(bytes(entries["pow2_codes"].flatten().tolist()), entries["pow2_scales"]),',
            ),
        ),
        head="KEPT = {}",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_fails(case, make_plugin, tmp_path):
    broken = BROKEN[case]
    name = make_plugin(*broken.changes, head=broken.head, tail=broken.tail)
    outcomes = run_kit(tmp_path, name, broken.test, broken.more)
    assert broken.test in outcomes.failed, f"{case}: the kit is content ({outcomes})"
    assert broken.says in outcomes.failed[broken.test], outcomes.failed[broken.test]


def test_method_that_only_loads(make_plugin, tmp_path):
    """can_quantize = False: the golden checkpoint takes the place of the tiny models."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(**shape, vocab_size=128)).save_pretrained(tmp_path / "dense")
    config = {"quant_method": make_plugin(), "group_size": 16}
    golden = tmp_path / "golden"
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(golden)
    no_quantize = "@hookimpl\ndef qhub_quantize("
    name = make_plugin((no_quantize, no_quantize.replace("@hookimpl\n", "").replace("qhub_", "_")))
    text = (golden / "config.json").read_text()
    (golden / "config.json").write_text(text.replace(config["quant_method"], name))
    assert AutoConfig.from_pretrained(golden).quantization_config["quant_method"] == name
    more = f"configs = []; can_quantize = False; checkpoint = {str(golden)!r}"
    outcomes = run_kit(tmp_path, name, "not fresh and not sharded and not process and not lora", more)
    assert outcomes.failed == {}
    assert {"test_every_layer_matches_float64", "test_missing_entry", "test_config_round_trip"} <= outcomes.passed
    # What needs quantizing has no cases, and pytest says so.
    assert "empty parameter set" in outcomes.skipped["test_odd_weights_stay_finite"]

    bare = run_kit(tmp_path, name, "test_kit_is_filled_in", "configs = []; can_quantize = False")
    assert "give TestBroken a checkpoint folder" in bare.failed["test_kit_is_filled_in"]


def test_method_without_a_package_fails(tmp_path):
    outcomes = run_kit(tmp_path, "broken_nobody", "test_listed_without_importing")
    assert "no installed package announces 'broken_nobody'" in outcomes.failed["test_listed_without_importing"]


def test_class_without_configs_fails(make_plugin, tmp_path):
    outcomes = run_kit(tmp_path, make_plugin(), "test_kit_is_filled_in", "configs = []")
    assert "configs is empty" in outcomes.failed["test_kit_is_filled_in"]


@dataclass
class Sabotage:
    """Says what of the core to replace ("module:attribute", by a function of the original), and what must fail."""

    target: str
    by: Callable
    test: str
    says: str


# What pluggable code cannot break, a defect of the core could: the kit notices that too.
CORE = {
    # transformers' own save writes over the previous files one by one.
    "save in place": Sabotage(
        "transformers:PreTrainedModel.save_pretrained",
        lambda ours: ours.__wrapped__,
        "test_failed_save_leaves_the_previous_files",
        "changed the previous checkpoint",
    ),
    "footprint as if dense": Sabotage(
        "transformers:PreTrainedModel.get_memory_footprint",
        lambda ours: ours.__wrapped__,
        "test_takes_less_memory",
        "get_memory_footprint says",
    ),
    "every kernel believed": Sabotage(
        "qhub.kernels.dispatch:disagreement",
        lambda ours: lambda *arguments: None,
        "test_wrong_kernel_is_refused",
        "was not refused",
    ),
    "twice the gradient": Sabotage(
        "qhub.kernels.linear:_times",
        lambda ours: lambda *arguments: 2 * ours(*arguments),
        "test_gradients_flow_to_inputs",
        "gradient is wrong",
    ),
    "entries not compared": Sabotage(
        "qhub.integrations.transformers.routing:check_entries",
        lambda ours: lambda *arguments: [],
        "test_missing_entry",
        "KeyError instead of QhubError",
    ),
    "dense tensors not compared": Sabotage(
        "qhub.integrations.transformers.routing:_Names.compare",
        lambda ours: lambda *arguments: [],
        "test_missing_dense_tensor",
        "a model was returned",
    ),
    "dequantize rounds to float16": Sabotage(
        "qhub.integrations.transformers.quantizer:undo_layers",
        lambda ours: lambda model, dtype: (ours(model, torch.float16), model.to(dtype)),
        "test_dequantize_gives_a_dense_model",
        "is not what the quantized weight stood for",
    ),
}


@pytest.mark.parametrize("case", CORE)
def test_broken_core_fails(case, make_plugin, tmp_path, monkeypatch):
    name = make_plugin()
    sabotage = CORE[case]
    module, _, path = sabotage.target.partition(":")
    holder, _, attribute = path.rpartition(".")
    owner = importlib.import_module(module)
    owner = getattr(owner, holder) if holder else owner
    monkeypatch.setattr(owner, attribute, sabotage.by(getattr(owner, attribute)))
    outcomes = run_kit(tmp_path, name, sabotage.test)
    assert sabotage.test in outcomes.failed, f"{case}: the kit is content ({outcomes})"
    assert sabotage.says in outcomes.failed[sabotage.test], outcomes.failed[sabotage.test]


def test_refused_merge_is_a_visible_skip(make_plugin, tmp_path):
    pytest.importorskip("peft")
    refusal = (
        "from qhub.merging import AdapterPolicy\n\n@hookimpl\ndef qhub_adapter(config, layout):\n"
        "    return AdapterPolicy(refuse='powers of two take no sums')\n"
    )
    outcomes = run_kit(tmp_path, make_plugin(tail=refusal), "lora")
    assert outcomes.failed == {}
    assert "powers of two take no sums" in outcomes.skipped["test_lora_merges_and_reloads"]
    assert "test_lora_trains" in outcomes.passed
