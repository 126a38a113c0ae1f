"""The kit itself: a plugin that breaks one invariant fails the test of that invariant, and for that reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import transformers

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
    file = folder / f"test_{name}_{folder.name}.py"
    file.write_text(TESTS.format(name=name, more=more))
    (folder / "pytest.ini").write_text("[pytest]\n")
    outcomes = Outcomes()
    pytest.main(
        [str(file), "-q", "-k", tests, "-p", "no:cacheprovider", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder),
         "--basetemp", str(folder / "inner"), "--import-mode=importlib", "-W", "ignore"],
        plugins=[outcomes],
    )  # fmt: skip
    assert outcomes.failed or outcomes.passed or outcomes.skipped, "the inner run collected nothing"
    return outcomes


@pytest.fixture
def make_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """A function that installs the example plugin with changes to its source, under a name of its own."""
    made: list[str] = []

    def make(*changes: tuple[str, str], head: str = "", tail: str = "") -> str:
        name = f"broken_{tmp_path.name.rstrip('0123456789').replace('-', '_').lower()[-20:]}_{len(made)}"
        source = EXAMPLE.read_text().replace('quant_method: ClassVar[str] = "pow2"', f'quant_method: ClassVar[str] = "{name}"')
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


IMPORTS_NATIVE = "try:\n    import broken_native\nexcept ImportError:\n    broken_native = None\n"

WRONG_FOR_MANY_ROWS = """
from qhub.kernels import KernelSpec, reference

def product(x, layout, parts, bias=None):
    y = reference.linear(x, layout, parts, bias)
    return y * 1.01 if len(x) > 3 else y

@hookimpl
def qhub_kernels():
    return [KernelSpec(name="many-rows-wrong", impl=f"{__name__}:product", layout="lookup", rank=100_000)]
"""

PLANS_AT_RANDOM = """
    import itertools
    size = config.group_size if next(COUNTER) % 2 else 2 * config.group_size
    grid = Grid.along_k(size)
    for weight in weights:
        plan[weight.name] = LayerPlan(Lookup(out_features=weight.out_features, in_features=weight.in_features, grid=grid))
    return plan
"""

BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "native import": (
        {"head": IMPORTS_NATIVE}, "test_entry_module_is_light", "broken_native",
    ),
    "misspelled hook": (
        {"changes": [("def qhub_quantize(", "def qhub_quantise(")]}, "test_loads_alone", "qhub_quantise",
    ),
    "unmarked hook": (
        {"tail": "def qhub_doctor():\n    return []"}, "test_no_hook_is_left_unmarked", "qhub_doctor",
    ),
    "any value is fine": (
        {"changes": [("self.group_size < 1", "False"), ("weight.in_features % config.group_size", "False")]},
        "test_bad_config_is_refused", "",
    ),
    "config forgets a value": (
        {"changes": [("    group_size: int = 32\n", "    group_size: int = 32\n\n    def to_dict(self):\n        "
                      "return {'quant_method': self.quant_method}\n")]},
        "test_config_round_trip", "to_dict",
    ),
    "unknown keys are dropped": (
        {"changes": [("    group_size: int = 32\n", "    group_size: int = 32\n\n    def __init__(self, group_size=32, "
                      "modules_to_not_convert=None, qhub_unknown=None):\n        self.group_size = group_size\n        "
                      "self.modules_to_not_convert = modules_to_not_convert\n")]},
        "test_unknown_key_is_refused", "DID NOT RAISE",
    ),
    "plan by chance": (
        {"changes": [("    plan = {}\n", "    plan = {}\n" + PLANS_AT_RANDOM)], "head": "import itertools\nCOUNTER = itertools.count(1)"},
        "test_plan_needs_no_data", "two calls of qhub_plan",
    ),
    "weight left out in silence": (
        {"changes": [("    return plan\n", '    return {k: v for k, v in plan.items() if "q_proj" not in k}\n')]},
        "test_every_weight_is_quantized_or_explained", "q_proj",
    ),
    "part of another dtype": (
        {"changes": [('return layout.encode(', 'return PLACE(layout.encode(')
                     , (', grid="refit")', ', grid="refit"))')],
         "head": "PLACE = lambda parts: {**parts, 'scales': parts['scales'].double()}"},
        "test_quantizing_gives_what_was_planned", "'scales' has dtype torch.float64",
    ),
    "writes into the weight": (
        {"changes": [("    specs = layout.part_specs()\n    empty", "    weight.clamp_(-0.02, 0.02)\n    specs = layout.part_specs()\n    empty")]},
        "test_quantizing_gives_what_was_planned", "wrote into the weight",
    ),
    "zeros become NaN": (
        {"changes": [('return layout.encode(', 'return PLACE(weight, layout.encode('), (', grid="refit")', ', grid="refit"))')],
         "head": "PLACE = lambda weight, parts: {**parts, 'scales': parts['scales'] / (weight.abs().max() > 0)}"},
        "test_odd_weights_stay_finite", "NaN",
    ),
    "scales rounded in the file": (
        {"changes": [('"pow2_scales": parts["scales"]}', '"pow2_scales": parts["scales"].half().float()}')]},
        "test_pack_and_unpack_are_exact", "'scales' comes back different",
    ),
    "entry not declared": (
        {"changes": [('            "pow2_scales": Entry(', '            "pow2_other": Entry(')]},
        "test_entries_are_as_declared", "pow2_scales",
    ),
    "NaN repaired in silence": (
        {"changes": [('"scales": entries["pow2_scales"],', '"scales": entries["pow2_scales"].nan_to_num(),')]},
        "test_impossible_number", "replaced in silence",
    ),
    "missing scales made up": (
        {"changes": [('specs["scales"].shape, specs["scales"].dtypes)', 'specs["scales"].shape, specs["scales"].dtypes, False)'),
                     ('"scales": entries["pow2_scales"],', '"scales": entries.get("pow2_scales", torch.ones(layout.scale_shape)),')]},
        "test_missing_entry", "it loads, in silence, as another weight",
    ),
    "longer tensors cut": (
        {"changes": [('Entry(specs["scales"].shape,', "Entry(None,"),
                     ('"scales": entries["pow2_scales"],', '"scales": entries["pow2_scales"][: layout.out_features],')]},
        "test_wrong_shape", "a model was returned",
    ),
    "kernel wrong for many rows": (
        {"tail": WRONG_FOR_MANY_ROWS}, "test_every_layer_matches_float64", "M=17",
    ),
    "more bytes than before": (
        {"more": "configs = [dict(group_size=1)]"}, "test_takes_less_memory", "in 16 bits it would take",
    ),
    "noise above the floor": (
        {"more": "min_sqnr = {0: 99.0}"}, "test_quantizing_gives_what_was_planned", "asks for 99.0 dB",
    ),
    "scales kept in the process": (
        # In this process a reload finds them; only a fresh one shows that the file lacks them.
        {"head": "KEPT = {}",
         "changes": [('return {"pow2_codes": parts["qweight"], "pow2_scales": parts["scales"]}',
                      'key = bytes(parts["qweight"].flatten().tolist())\n        KEPT[key] = parts["scales"]\n'
                      '        return {"pow2_codes": parts["qweight"], "pow2_scales": torch.ones_like(parts["scales"])}'),
                     ('"scales": entries["pow2_scales"],',
                      '"scales": KEPT.get(bytes(entries["pow2_codes"].flatten().tolist()), entries["pow2_scales"]),')]},
        "test_reloads_bit_identical_in_a_fresh_process", "not bit-identical",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_fails(case, make_plugin, tmp_path):
    how, test, reason = BROKEN[case]
    name = make_plugin(*how.get("changes", []), head=how.get("head", ""), tail=how.get("tail", ""))
    outcomes = run_kit(tmp_path, name, test, how.get("more", ""))
    assert test in outcomes.failed, f"{case}: the kit is content ({outcomes})"
    assert reason in outcomes.failed[test], outcomes.failed[test]


def test_method_without_a_package_fails(tmp_path):
    outcomes = run_kit(tmp_path, "broken_nobody", "test_listed_without_importing")
    assert "no installed package announces 'broken_nobody'" in outcomes.failed["test_listed_without_importing"]


def test_class_without_configs_fails(make_plugin, tmp_path):
    outcomes = run_kit(tmp_path, make_plugin(), "test_kit_is_filled_in", "configs = []")
    assert "configs is empty" in outcomes.failed["test_kit_is_filled_in"]


def test_save_in_place_fails(make_plugin, tmp_path, monkeypatch):
    """transformers' own save writes over the previous files one by one."""
    name = make_plugin()
    ours = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", ours.__wrapped__)
    outcomes = run_kit(tmp_path, name, "test_failed_save_leaves_the_previous_files")
    assert "changed the previous checkpoint" in outcomes.failed["test_failed_save_leaves_the_previous_files"]


def test_dispatcher_that_believes_everything_fails(make_plugin, tmp_path, monkeypatch):
    name = make_plugin()
    monkeypatch.setattr(dispatch, "_disagreement", lambda *arguments: None)
    outcomes = run_kit(tmp_path, name, "wrong_kernel")
    assert set(outcomes.failed) == {"test_wrong_kernel_is_refused", "test_forcing_a_wrong_kernel_raises"}


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
