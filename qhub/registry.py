"""Finds plugins by entry points: lists them without importing, loads one when its name is used, isolates the broken.

Groups: ``qhub.plugins`` (entry name = ``quant_method``) and ``qhub.kernels`` (packages that only bring kernels).
``QHUB_DISABLE=a,b`` leaves plugins out by name.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from qhub.errors import PluginError, QhubError, UnknownMethodError
from qhub.hookspecs import QuantizerPlugin

__all__ = ["KERNEL_GROUP", "METHOD_GROUP", "PluginInfo", "Registry", "registry"]

METHOD_GROUP = "qhub.plugins"
KERNEL_GROUP = "qhub.kernels"


@dataclass(frozen=True)
class PluginInfo:
    """Describes an installed plugin from package metadata alone.

    ``name``: the quantization method, or a free name in the kernel group. ``distribution``, ``version``: of the
    package. ``target``: what the entry point names. ``clash``: other distributions that announce the same name; empty
    when none.
    """

    name: str
    group: str
    distribution: str
    version: str
    target: str
    clash: tuple[str, ...] = ()


class Registry:
    """Holds the plugins of this process.

    One instance, :data:`registry`, is all a program needs; tests make their own with :meth:`register`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._manager = pluggy.PluginManager("qhub")
        self._manager.add_hookspecs(QuantizerPlugin)
        self._listed: dict[tuple[str, str], list[EntryPoint]] | None = None
        self._loaded: dict[tuple[str, str], Any] = {}
        self.failures: dict[str, PluginError] = {}
        self._said: set[str] = set()

    # -- listing -----------------------------------------------------------------------------------------------------

    def _entries(self) -> dict[tuple[str, str], list[EntryPoint]]:
        if self._listed is None:
            listed: dict[tuple[str, str], list[EntryPoint]] = {}
            for group in (METHOD_GROUP, KERNEL_GROUP):
                for entry in entry_points(group=group):
                    known = listed.setdefault((group, entry.name), [])
                    # An editable reinstall can leave two metadata folders of one distribution: that is no clash.
                    if all((_dist(entry), entry.value) != (_dist(other), other.value) for other in known):
                        known.append(entry)
            self._listed = listed
        return self._listed

    def disabled(self) -> frozenset[str]:
        """Return the names that ``QHUB_DISABLE`` turns off."""
        return frozenset(filter(None, (name.strip() for name in os.environ.get("QHUB_DISABLE", "").split(","))))

    def handed_back(self) -> frozenset[str]:
        """Return the methods that ``QHUB_NATIVE`` gives back to transformers."""
        return frozenset(filter(None, (name.strip() for name in os.environ.get("QHUB_NATIVE", "").split(","))))

    def list(self, group: str = METHOD_GROUP) -> dict[str, PluginInfo]:
        """Return every installed, enabled plugin of ``group`` by name, importing none."""
        found = {}
        for (one_group, name), entries in sorted(self._entries().items()):
            if one_group != group or name in self.disabled():
                continue
            entry = entries[0]
            clash = tuple(_dist(other) for other in entries[1:])
            version = entry.dist.version if entry.dist is not None else "?"
            found[name] = PluginInfo(name, group, _dist(entry), version, entry.value, clash)
        for (one_group, name), plugin in self._loaded.items():
            if one_group == group and name not in found and name not in self.disabled():
                found[name] = PluginInfo(name, group, "(registered in this process)", "?", repr(plugin))
        return found

    def refresh(self) -> None:
        """Forget what was listed, so that packages installed since are found."""
        with self._lock:
            self._listed = None
            self.failures.clear()
            self._said.clear()

    # -- loading -----------------------------------------------------------------------------------------------------

    def register(self, plugin: Any, name: str, group: str = METHOD_GROUP) -> None:
        """Add a plugin object under ``name`` without an entry point.

        Raises :class:`PluginError` when the name is taken or the plugin has a hook that the spec does not know.
        """
        with self._lock:
            if (group, name) in self._loaded:
                raise PluginError(
                    f"a plugin named {name!r} is already registered: choose another name or unregister it"
                )
            instance = plugin() if isinstance(plugin, type) else plugin
            try:
                self._manager.register(instance, name=f"{group}:{name}")
                self._manager.check_pending()
            except (pluggy.PluginValidationError, ValueError) as error:
                if self._manager.has_plugin(f"{group}:{name}"):
                    self._manager.unregister(name=f"{group}:{name}")
                raise PluginError(f"plugin {name!r} does not fit qhub's hook spec: {error}") from error
            self._loaded[group, name] = instance

    def unregister(self, name: str, group: str = METHOD_GROUP) -> None:
        """Remove a plugin that was registered or loaded; unknown names are ignored."""
        with self._lock:
            if self._loaded.pop((group, name), None) is not None:
                self._manager.unregister(name=f"{group}:{name}")

    def load(self, name: str, group: str = METHOD_GROUP) -> Any:
        """Return the plugin ``name``, importing it on first use.

        Raises :class:`UnknownMethodError` when none is installed (naming the package to install), :class:`PluginError`
        when it is disabled, broken, or announced by two distributions.
        """
        with self._lock:
            if name in self.disabled():
                raise PluginError(f"the plugin {name!r} is turned off by QHUB_DISABLE={os.environ['QHUB_DISABLE']}")
            if (group, name) in self._loaded:
                return self._loaded[group, name]
            if name in self.failures:
                raise self.failures[name]
            entries = self._entries().get((group, name))
            if not entries:
                known = ", ".join(self.list(group)) or "none"
                raise UnknownMethodError(
                    f"no installed plugin serves the quantization method {name!r} (installed: {known}): "
                    f"pip install qhub-{name.replace('_', '-')}"
                )
            if len(entries) > 1:
                owners = " and ".join(sorted(_dist(entry) for entry in entries))
                raise PluginError(f"the plugin name {name!r} is announced by {owners}: uninstall one of them")
            try:
                self.register(entries[0].load(), name, group)
            except Exception as error:
                failure = PluginError(
                    f"the plugin {name!r} of {_dist(entries[0])} could not be loaded ({entries[0].value}): "
                    f"{type(error).__name__}: {error}. Reinstall or update {_dist(entries[0])}, or set "
                    f"QHUB_DISABLE={name}"
                )
                failure.__cause__ = error
                self.failures[name] = failure
                raise failure from error
            return self._loaded[group, name]

    # -- calling -----------------------------------------------------------------------------------------------------

    def has(self, name: str, hook: str) -> bool:
        """Return whether the plugin ``name`` implements ``hook``."""
        plugin = self.load(name)
        return any(impl.plugin is plugin for impl in getattr(self._manager.hook, hook).get_hookimpls())

    def call(self, name: str, hook: str, **arguments: Any) -> Any:
        """Call ``hook`` of the plugin ``name`` alone and return its answer; None when it has no such hook.

        Errors of :class:`QhubError` pass as they are, others become :class:`PluginError` naming plugin and hook.
        """
        plugin = self.load(name)
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        try:
            return self._manager.subset_hook_caller(hook, others)(**arguments)
        except QhubError:
            raise
        except Exception as error:
            raise PluginError(f"{hook} of the plugin {name!r} failed: {type(error).__name__}: {error}") from error

    def broadcast(
        self,
        hook: str,
        groups: Sequence[str] = (METHOD_GROUP, KERNEL_GROUP),
        names: Collection[str] | None = None,
        **arguments: Any,
    ) -> Iterator[tuple[str, Any]]:
        """Call ``hook`` of every plugin in turn and yield (plugin name, answer) for those that answer.

        ``names``: ask (and load) only these; None for all.
        A plugin that cannot be loaded or raises is recorded in :attr:`failures`, named in a warning and left out.
        """
        for group in groups:
            for name in self.list(group):
                if names is not None and name not in names:
                    continue
                try:
                    plugin = self.load(name, group)
                    others = [other for other in self._manager.get_plugins() if other is not plugin]
                    answer = self._manager.subset_hook_caller(hook, others)(**arguments)
                except Exception as error:
                    self._record(name, hook, error)
                    continue
                spec = self._manager.hook.__dict__[hook].spec
                if spec is not None and not spec.opts.get("firstresult"):
                    answer = answer[0] if answer else None
                if answer is not None:
                    yield name, answer

    def _record(self, name: str, hook: str, error: Exception) -> None:
        failure = (
            error
            if isinstance(error, PluginError)
            else PluginError(f"{hook} of the plugin {name!r} failed: {type(error).__name__}: {error}")
        )
        self.failures.setdefault(name, failure)
        message = f"qhub goes on without the plugin {name!r}: {failure}"
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def _dist(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "(unknown distribution)"


@cache
def _instance() -> Registry:
    return Registry()


registry = _instance()
