"""The registry and the autoload door: lists without importing, isolates what is broken, and costs little."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qhub.errors import ConfigError, PluginError, UnknownMethodError
from qhub.hookspecs import hookimpl
from qhub.registry import KERNEL_GROUP, METHOD_GROUP, Registry

GOOD = "from qhub.hookspecs import hookimpl\n\n@hookimpl\ndef qhub_doctor():\n    return ['{name}']\n"
RAISES = "raise RuntimeError('no luck today')\n"
MISSPELLED = "from qhub.hookspecs import hookimpl\n\n@hookimpl\ndef qhub_docter():\n    return []\n"
HOOK_RAISES = "from qhub.hookspecs import hookimpl\n\n@hookimpl\ndef qhub_doctor():\n    return 1 / 0\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """A function that puts a package with an entry point on the path, and returns the module's name.

    Fresh processes see it too, by PYTHONPATH.
    """
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    for variable in ("QHUB_DISABLE", "QHUB_NATIVE", "QHUB_AUTOLOAD"):
        monkeypatch.delenv(variable, raising=False)
    made = []

    def put(name: str, source: str, distribution: str = "", group: str = METHOD_GROUP, target: str = "") -> str:
        distribution = distribution or f"dist-{name.replace('_', '-')}"
        module = f"mod_{distribution.replace('-', '_')}"
        (folder / f"{module}.py").write_text(source.format(name=name))
        metadata = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {target or module}\n")
        made.append(module)
        return module

    yield put
    for module in made:
        sys.modules.pop(module, None)


def fresh(program: str, **env: str) -> str:
    """Run ``program`` in a new process and return what it prints; its errors fail the test."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- listing ---------------------------------------------------------------------------------------------------------


def test_listing_imports_no_plugin_and_no_torch(site):
    site("listed", RAISES)
    program = """
import sys
from qhub.registry import registry
info = registry.list()["listed"]
print(info.distribution, info.version, info.target, info.clash)
print([m for m in ("torch", "transformers", "mod_dist_listed") if m in sys.modules])
"""
    assert fresh(program).splitlines() == ["dist-listed 1.2 mod_dist_listed ()", "[]"]


def test_listing_by_group(site):
    site("only_kernels", GOOD, group=KERNEL_GROUP)
    registry = Registry()
    assert "only_kernels" in registry.list(KERNEL_GROUP)
    assert "only_kernels" not in registry.list()


def test_packages_installed_later_are_found_after_refresh(site):
    registry = Registry()
    registry.list()
    site("late", GOOD)
    assert "late" not in registry.list()
    registry.refresh()
    assert "late" in registry.list()


def test_loading_imports_only_the_one(site):
    wanted, other = site("wanted", GOOD), site("other", GOOD)
    registry = Registry()
    plugin = registry.load("wanted")
    assert plugin.__name__ == wanted
    assert registry.load("wanted") is plugin
    assert other not in sys.modules
    assert registry.call("wanted", "qhub_doctor") == [["wanted"]]


def test_unknown_method_names_the_package():
    with pytest.raises(UnknownMethodError, match=r"'no_such_one'.*pip install qhub-no-such-one"):
        Registry().load("no_such_one")


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"), [(RAISES, "no luck today"), (MISSPELLED, "qhub_docter"), (HOOK_RAISES, "division by zero")]
)
def test_broken_plugin_does_not_stop_the_others(source, said, site):
    """Alphabetically the broken one is between two good ones: both answer, and one warning names the broken one."""
    for name, text in (("reg_a", GOOD), ("reg_b", source), ("reg_c", GOOD)):
        site(name, text)
    registry = Registry()
    with pytest.warns(RuntimeWarning, match="reg_b") as caught:
        answers = dict(registry.broadcast("qhub_doctor"))
    assert answers["reg_a"] == ["reg_a"]
    assert answers["reg_c"] == ["reg_c"]
    assert "reg_b" not in answers
    assert len([w for w in caught if "reg_b" in str(w.message)]) == 1
    assert said in str(registry.failures["reg_b"])


def test_failure_is_recorded_once(site, tmp_path):
    """A plugin that cannot be imported is tried once; after that the same error comes without another try."""
    trace = tmp_path / "tries"
    site("tried", f"open({str(trace)!r}, 'a').write('x')\nraise ImportError('libtried.so is missing')\n")
    registry = Registry()
    for _ in range(3):
        with pytest.raises(PluginError, match=r"'tried' of dist-tried.*libtried\.so is missing.*QHUB_DISABLE=tried"):
            registry.load("tried")
    assert trace.read_text() == "x"
    with pytest.warns(RuntimeWarning, match="without the plugin 'tried'"):
        list(registry.broadcast("qhub_doctor"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(registry.broadcast("qhub_doctor"))
    assert trace.read_text() == "x"
    assert list(registry.failures) == ["tried"]


def test_clash_names_both_distributions(site):
    site("twice", GOOD, distribution="dist-one")
    site("twice", GOOD, distribution="dist-two")
    registry = Registry()
    assert {registry.list()["twice"].distribution, *registry.list()["twice"].clash} == {"dist-one", "dist-two"}
    with pytest.raises(PluginError, match="dist-one and dist-two: uninstall one"):
        registry.load("twice")


def test_same_distribution_twice_is_no_clash(site, tmp_path, monkeypatch):
    """An editable reinstall leaves the metadata of the same package in two places."""
    site("again", GOOD)
    other = tmp_path / "other"
    (other / "dist_again-1.1.dist-info").mkdir(parents=True)
    (other / "dist_again-1.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: dist-again\nVersion: 1.1\n"
    )
    (other / "dist_again-1.1.dist-info" / "entry_points.txt").write_text(f"[{METHOD_GROUP}]\nagain = mod_dist_again\n")
    monkeypatch.syspath_prepend(str(other))
    registry = Registry()
    assert registry.list()["again"].clash == ()
    registry.load("again")


def test_disabled_plugins_are_gone(site, monkeypatch):
    module = site("off", GOOD)
    site("on", GOOD)
    monkeypatch.setenv("QHUB_DISABLE", "off, something_else")
    registry = Registry()
    assert "off" not in registry.list()
    assert "on" in registry.list()
    with pytest.raises(PluginError, match="QHUB_DISABLE"):
        registry.load("off")
    assert "off" not in dict(registry.broadcast("qhub_doctor"))
    assert module not in sys.modules


def test_misspelled_hook_is_refused_and_leaves_nothing():
    class Misspelled:
        @hookimpl
        def qhub_konfig(self):
            return None

    class Fine:
        @hookimpl
        def qhub_doctor(self):
            return ["fine"]

    registry = Registry()
    with pytest.raises(PluginError, match="qhub_konfig"):
        registry.register(Misspelled(), "mine")
    registry.register(Fine(), "mine")
    assert registry.call("mine", "qhub_doctor") == [["fine"]]


def test_hook_with_an_unknown_argument_is_refused():
    class Wrong:
        @hookimpl
        def qhub_plan(self, config, wieghts):
            return {}

    with pytest.raises(PluginError, match="wieghts"):
        Registry().register(Wrong(), "wrong")


def test_name_can_be_taken_once():
    class Plugin:
        @hookimpl
        def qhub_doctor(self):
            return []

    registry = Registry()
    registry.register(Plugin(), "name")
    with pytest.raises(PluginError, match="already registered"):
        registry.register(Plugin(), "name")
    registry.unregister("name")
    registry.register(Plugin(), "name")


# -- calling ---------------------------------------------------------------------------------------------------------


def test_addressed_call_reaches_one_plugin_only():
    asked = []

    def plugin(name):
        class Plugin:
            @hookimpl
            def qhub_config(self):
                asked.append(name)
                return name

        return Plugin()

    registry = Registry()
    registry.register(plugin("one"), "one")
    registry.register(plugin("two"), "two")
    assert registry.call("one", "qhub_config") == "one"
    assert asked == ["one"]
    assert registry.has("one", "qhub_config")
    assert not registry.has("one", "qhub_quantize")
    assert registry.call("one", "qhub_quantize", config=None, weight=None, layout=None, statistics={}) is None


def test_errors_of_a_hook_name_plugin_and_hook():
    class Plugin:
        @hookimpl
        def qhub_config(self):
            raise ConfigError("said on purpose")

        @hookimpl
        def qhub_format(self, config):
            return {}["absent"]

    registry = Registry()
    registry.register(Plugin(), "mine")
    with pytest.raises(ConfigError, match="said on purpose"):
        registry.call("mine", "qhub_config")
    with pytest.raises(PluginError, match=r"qhub_format of the plugin 'mine' failed: KeyError"):
        registry.call("mine", "qhub_format", config=None)


def test_threads_load_a_plugin_once(site, tmp_path):
    trace = tmp_path / "tries"
    site("racing", f"import time\ntime.sleep(0.05)\nopen({str(trace)!r}, 'a').write('x')\n" + GOOD)
    registry = Registry()
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(registry.load("racing"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert trace.read_text() == "x"


# -- the door --------------------------------------------------------------------------------------------------------

SERVED = """
import transformers.modeling_utils
from transformers.quantizers import auto
for name in ({names}):
    served = auto.AUTO_QUANTIZER_MAPPING.get(name)
    homes = [cls.__module__.partition(".")[0] for cls in served.__mro__] if served else [None]
    print(name, "qhub" if "qhub" in homes else homes[0])
"""


def test_importing_transformers_registers_the_methods(site):
    """A new name is added and one that transformers knows is taken over, without loading either plugin."""
    site("door_new", RAISES)
    site("vptq", RAISES)
    program = SERVED.format(names="'door_new', 'vptq', 'higgs'") + "import sys; print('mod_dist_vptq' in sys.modules)"
    assert fresh(program).splitlines() == ["door_new qhub", "vptq qhub", "higgs transformers", "False"]


@pytest.mark.parametrize("first", ["torch", "transformers.quantizers.auto", "qhub.registry"])
def test_import_order_does_not_matter(first, site):
    site("door_order", GOOD)
    assert fresh(f"import {first}\n" + SERVED.format(names="'door_order',")) == "door_order qhub"


def test_native_gives_a_name_back(site):
    site("vptq", GOOD)
    site("higgs", GOOD)
    said = fresh(SERVED.format(names="'vptq', 'higgs'"), QHUB_NATIVE="vptq, something_else")
    assert said.splitlines() == ["vptq transformers", "higgs qhub"]


def test_autoload_can_be_turned_off(site):
    site("door_off", GOOD)
    program = SERVED.format(names="'door_off', 'higgs'") + "import sys; print('qhub.registry' in sys.modules)"
    assert fresh(program, QHUB_AUTOLOAD="0").splitlines() == ["door_off None", "higgs transformers", "False"]


@pytest.mark.parametrize(
    ("value", "armed"), [("0", False), ("false", False), (" OFF ", False), ("1", True), ("", True)]
)
def test_values_of_the_switch(value, armed):
    program = "import sys; from qhub.autoload import arm; arm(); print('wrapt' in sys.modules)"
    assert fresh(program, QHUB_AUTOLOAD=value) == str(armed)


def test_broken_plugin_breaks_neither_import(site):
    """Its code is not even run; using its name is what fails, with one clear error."""
    site("door_broken", RAISES)
    program = """
import torch, transformers
from transformers.quantizers import auto
try:
    auto.AutoQuantizationConfig.from_dict({"quant_method": "door_broken"})
except Exception as error:
    print(type(error).__name__, "no luck today" in str(error))
"""
    assert fresh(program) == "PluginError True"


@pytest.mark.parametrize(
    "damage",
    [
        "import sys; sys.modules['wrapt'] = None",
        "import sys; sys.modules['qhub.integrations.transformers'] = None",
        "import sys; sys.modules['qhub.integrations.config_classes'] = None",
    ],
)
def test_broken_qhub_leaves_torch_and_transformers_usable(damage, site):
    """Whatever of qhub cannot be imported: a warning, and `import torch` goes on."""
    program = f"""
import warnings
{damage}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, transformers
    from transformers import LlamaConfig, AutoModelForCausalLM
    from transformers.quantizers import auto
print(torch.ones(2).sum().item(), any("qhub" in str(w.message) for w in caught))
"""
    assert fresh(program) == "2.0 True"


# -- what it costs ---------------------------------------------------------------------------------------------------


def median_ms(program: str, runs: int = 3) -> float:
    """Return the median of what ``program`` prints (seconds), in milliseconds, over fresh processes."""
    return 1000 * statistics.median(float(fresh(program)) for _ in range(runs))


def test_importing_qhub_is_light():
    """Under 100 ms, with slack for a busy machine, and no heavy module."""
    heavy = (
        "import sys, qhub; print([m for m in ('torch', 'transformers', 'numpy', 'peft', 'typer') if m in sys.modules])"
    )
    assert fresh(heavy) == "[]"
    program = "import time; a = time.process_time(); import qhub; print(time.process_time() - a)"
    # Processor time: what others run on the machine counts only through its caches, for which a factor of three is
    # enough.
    assert median_ms(program) < 3 * 100


def test_arming_is_light():
    """arm() adds under 20 ms to `import torch`, and imports nothing of qhub but itself."""
    program = """
import os
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import gc, torch, time
from importlib.metadata import entry_points
entry = next(e for e in entry_points(group="torch.backends") if e.name == "qhub")
# A collection of torch's objects takes 100 ms and falls where it falls: on Python 3.13 just here.
gc.disable()
start = time.process_time()
entry.load()()
print(time.process_time() - start)
"""
    assert median_ms(program) < 3 * 20


def test_arming_imports_nothing_heavy():
    program = """
import os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
before = set(sys.modules)
from qhub.autoload import arm
arm()
new = set(sys.modules) - before
print(sorted(m for m in new if m.startswith("qhub.") and m != "qhub.autoload" and m != "qhub.hookspecs"))
print([m for m in ("transformers", "accelerate", "safetensors", "peft", "typer") if m in sys.modules])
"""
    assert fresh(program).splitlines() == ["[]", "[]"]
