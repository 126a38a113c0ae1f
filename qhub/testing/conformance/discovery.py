"""Checks that a method is found by its entry point, loads alone, and costs little to import."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qhub.errors import PluginError
from qhub.hookspecs import hookimpl
from qhub.kernels import KernelSpec
from qhub.registry import Registry, registry
from qhub.reports import Finding
from qhub.testing.conformance.processes import run_fresh
from qhub.testing.conformance.subject import KitBase
from qhub.testing.conformance.workbench import Workbench

__all__ = ["DiscoveryChecks"]

# A stub in the place of each native package tells an import from a mere look with importlib.util.find_spec.
_STUB = """
import sys
sys._qhub_native = [*getattr(sys, "_qhub_native", []), __name__]
raise ImportError(__name__ + " is out of bounds here")
"""

_PROGRAM = """
import json, sys, warnings
task = json.loads(sys.argv[1])
sys.path.insert(0, task["stubs"])
said = {}
import qhub
said["heavy"] = [name for name in ("torch", "transformers") if name in sys.modules]
from qhub.registry import registry
listed = registry.list()
said["listed"] = {name: [info.distribution, list(info.clash)] for name, info in listed.items()}
targets = {name: info.target.partition(":")[0] for name, info in listed.items()}
said["imported_by_listing"] = [name for name, module in targets.items() if module in sys.modules]
try:
    registry.load(task["method"])
except qhub.QhubError as error:
    said["failure"] = str(error)
said["imported_by_loading"] = [name for name, module in targets.items() if module in sys.modules]
said["native"] = getattr(sys, "_qhub_native", [])
said["transformers"] = "transformers" in sys.modules
print(json.dumps(said))
"""


class DiscoveryChecks(KitBase):
    """Looks at the plugin as an installed package: nothing of a model yet."""

    @pytest.fixture
    def fresh_load(self, bench: Workbench) -> dict[str, Any]:
        """Return what a new process saw when it listed the plugins and loaded this one."""

        def load() -> dict[str, Any]:
            stubs = bench.folder("stubs")
            for package in self.native_packages:
                (stubs / package).mkdir()
                (stubs / package / "__init__.py").write_text(_STUB, encoding="utf-8")
            return run_fresh(_PROGRAM, {"method": self.method, "stubs": str(stubs)})

        return bench.once("fresh load", load)

    def test_kit_is_filled_in(self) -> None:
        """The class names a method, and gives something to test it with."""
        assert self.method, f"{type(self).__name__}.method is empty: set it to the entry point's name"
        if self.can_quantize:
            assert self.configs, f"{type(self).__name__}.configs is empty: give at least one config of {self.method}"
        else:
            assert self.checkpoints(), f"{self.method} cannot quantize: give {type(self).__name__} a checkpoint folder"
        for folder in self.checkpoints():
            assert (folder / "config.json").is_file(), f"{folder} holds no config.json: it is no checkpoint"

    def test_listed_without_importing(self, fresh_load: dict[str, Any]) -> None:
        """The entry point is found by one distribution, and listing imports no plugin."""
        assert self.method in fresh_load["listed"], (
            f"no installed package announces {self.method!r} in the entry-point group qhub.plugins: pip install -e . "
            f"(found: {sorted(fresh_load['listed'])})"
        )
        distribution, clash = fresh_load["listed"][self.method]
        assert not clash, f"{self.method!r} is announced by {distribution} and by {clash}"
        assert fresh_load["imported_by_listing"] == [], "listing plugins imported some of them"

    def test_importing_qhub_is_light(self, fresh_load: dict[str, Any]) -> None:
        """`import qhub` loads neither torch nor transformers, this plugin installed or not."""
        assert fresh_load["heavy"] == [], f"import qhub loaded {fresh_load['heavy']}"

    def test_loads_alone(self, fresh_load: dict[str, Any]) -> None:
        """The plugin loads in a new process, and brings no other plugin in."""
        assert "failure" not in fresh_load, fresh_load.get("failure")
        assert fresh_load["imported_by_loading"] == [self.method], "loading one plugin imported others"

    def test_entry_module_is_light(self, fresh_load: dict[str, Any]) -> None:
        """Importing the entry module tries to import none of the native packages."""
        assert fresh_load["native"] == [], (
            f"the entry module of {self.method!r} imports {fresh_load['native']}: import it in the hook that needs it"
        )

    def test_has_the_hooks_of_a_method(self) -> None:
        """The compulsory hooks are there, and qhub_quantize exactly where the class says so."""
        for hook in ("qhub_config", "qhub_plan", "qhub_format"):
            assert registry.has(self.method, hook), f"the plugin {self.method!r} lacks the hook {hook}"
        assert registry.has(self.method, "qhub_quantize") == self.can_quantize, (
            f"can_quantize is {self.can_quantize}, and the plugin says otherwise by (not) having qhub_quantize"
        )

    def test_no_hook_is_left_unmarked(self) -> None:
        """A function named like a hook but without @hookimpl would never be called, in silence."""
        plugin = registry.load(self.method)
        functions = {name: getattr(plugin, name) for name in dir(plugin) if name.startswith("qhub_")}
        # pluggy's marker leaves this attribute on the function.
        unmarked = sorted(name for name, one in functions.items() if callable(one) and not hasattr(one, "qhub_impl"))
        assert not unmarked, f"{unmarked} of the plugin {self.method!r} are not marked: add @hookimpl, or rename them"

    def test_misspelled_hook_is_refused(self) -> None:
        """The plugin with one hook more, of a name that the spec does not know, does not load."""
        plugin = registry.load(self.method)
        hooks = {name: staticmethod(getattr(plugin, name)) for name in dir(plugin) if name.startswith("qhub_")}
        misspelled = type("Misspelled", (), {**hooks, "qhub_quantise": staticmethod(hookimpl(lambda config: None))})
        with pytest.raises(PluginError, match="qhub_quantise"):
            Registry().register(misspelled, self.method)

    def test_can_be_turned_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """QHUB_DISABLE takes the method away, and the error names the variable."""
        monkeypatch.setenv("QHUB_DISABLE", self.method)
        with pytest.raises(PluginError, match="QHUB_DISABLE"):
            registry.load(self.method)
        assert self.method not in registry.list()

    def test_presets_are_configs(self, bench: Workbench) -> None:
        """Every preset is a config that the method takes."""
        for name, values in registry.call(self.method, "qhub_config").presets.items():
            assert json.loads(json.dumps(dict(values))) == dict(values), f"preset {name!r} is not plain data"
            bench.parse(values)

    def test_tooling_answers(self) -> None:
        """Kernels are declared as data, and findings are ones that `qhub doctor` can print."""
        # Broadcast hooks answer with a list of one answer per plugin asked, here of none or one.
        for kernels in registry.call(self.method, "qhub_kernels") or []:
            for kernel in kernels:
                assert isinstance(kernel, KernelSpec), f"qhub_kernels gave a {type(kernel).__name__}"
                assert ":" in kernel.impl, f"kernel {kernel.name!r}: impl {kernel.impl!r} is not 'module:function'"
        for findings in registry.call(self.method, "qhub_doctor") or []:
            for finding in findings:
                assert isinstance(finding, Finding), f"qhub_doctor gave a {type(finding).__name__}"
                assert finding.status in ("ok", "note", "warning", "error"), finding
