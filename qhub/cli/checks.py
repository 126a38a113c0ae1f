"""What ``qhub doctor`` checks: versions, settings, the way into transformers, devices, plugins."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, entry_points, requires, version
from pathlib import Path

from qhub.cli.list_ import served_by
from qhub.errors import QhubError
from qhub.registry import KERNEL_GROUP, METHOD_GROUP, registry
from qhub.reports import Finding

__all__ = ["all_findings"]

_CORE = "qhub-core"
# Another team's product, whose wheel brings a package of the same import name.
_NAMESAKE = "qhub"

# What kernels ask of a processor, by the names of /proc/cpuinfo (x86 flags, ARM features).
_CPU_FEATURES = (
    "avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def all_findings() -> list[Finding]:
    """Return every finding, in the order in which they are best read."""
    first = [finding for check in (_packages, _namesake, _settings) for finding in check()]
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        # Said above already; nothing else can be tried.
        return first
    return first + [finding for check in (_door, _devices, _plugins, _kernel) for finding in check()]


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what the packages of qhub require."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    try:
        wanted = requires(_CORE) or []
    except PackageNotFoundError:
        yield Finding(
            "error",
            _CORE,
            "runs from a folder that is not installed, so nothing can find it: neither transformers nor plugins",
            f"pip install {_CORE}, or pip install -e . in its folder",
        )
        return
    yield from _requirements(_CORE, wanted, extras={"", "peft"}, quiet=False)
    owners = {info.distribution for group in (METHOD_GROUP, KERNEL_GROUP) for info in registry.list(group).values()}
    for owner in sorted(owners):
        try:
            wanted = requires(owner) or []
        except PackageNotFoundError:
            # Registered by a program: it has no package and so no requirements.
            continue
        yield from _requirements(owner, wanted, extras={""}, quiet=True)


def _requirements(owner: str, wanted: list[str], extras: set[str], quiet: bool) -> Iterator[Finding]:
    """Yield a finding per requirement that applies here; ``quiet``: only for those that are not met."""
    from packaging.requirements import Requirement

    for line in wanted:
        requirement = Requirement(line)
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if optional and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras if requirement.marker
        ):
            continue
        needs = f"{owner} needs {requirement.specifier}" if str(requirement.specifier) else f"needed by {owner}"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if optional:
                yield Finding(
                    "note", requirement.name, f"not installed; optional ({needs})", f"pip install {requirement.name}"
                )
            else:
                yield Finding("error", requirement.name, f"not installed; {needs}", f"pip install '{line}'")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield Finding(
                "warning" if optional else "error",
                requirement.name,
                f"{found} is installed; {needs}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
        elif not quiet:
            yield Finding("ok", requirement.name, f"{found} ({needs})")


def _namesake() -> Iterator[Finding]:
    try:
        other = distribution(_NAMESAKE)
    except PackageNotFoundError:
        return
    yield Finding(
        "error",
        "the package 'qhub'",
        f"the distribution qhub {other.version} is installed: it is another team's product, and its files lie in the "
        f"same folder qhub/ as those of {_CORE}",
        f"pip uninstall qhub, then pip install --force-reinstall --no-deps {_CORE}",
    )


def _settings() -> Iterator[Finding]:
    """Say which of qhub's variables are set, and which of them name nothing."""
    methods = set(registry.list()) | registry.disabled()
    for key, what in (("QHUB_NATIVE", "left to transformers"), ("QHUB_DISABLE", "turned off")):
        names = {name.strip() for name in os.environ.get(key, "").split(",")} - {""}
        known = methods if key == "QHUB_NATIVE" else _announced()
        if names & known:
            yield Finding("note", key, f"{what}: {', '.join(sorted(names & known))}", f"unset {key} to use the plugins")
        if names - known:
            yield Finding(
                "warning",
                key,
                f"names {', '.join(sorted(names - known))}, which no installed plugin is called",
                "correct the spelling; qhub list shows the names",
            )
    if os.environ.get("QHUB_ALLOW_PICKLE") == "1":
        yield Finding(
            "note",
            "QHUB_ALLOW_PICKLE",
            "checkpoints that are not safetensors are read too",
            "unset it unless you trust them",
        )


def _announced() -> set[str]:
    return {entry.name for group in (METHOD_GROUP, KERNEL_GROUP) for entry in entry_points(group=group)}


def _door() -> Iterator[Finding]:
    """Say whether a process that imports only transformers gets qhub's methods."""
    subject = "automatic loading"
    if os.environ.get("QHUB_AUTOLOAD", "1").strip().lower() in ("0", "false", "no", "off"):
        yield Finding("warning", subject, f"off: QHUB_AUTOLOAD={os.environ['QHUB_AUTOLOAD']}", "unset QHUB_AUTOLOAD")
    elif os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        # torch/__init__.py, _is_device_backend_autoload_enabled: it stops every entry point of torch.backends.
        yield Finding(
            "warning", subject, "off: TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from calling qhub", "unset it"
        )
    elif not any(entry.value.startswith("qhub.autoload") for entry in entry_points(group="torch.backends")):
        yield Finding("error", subject, "torch does not know qhub: its entry point is missing", f"reinstall {_CORE}")
    else:
        yield _joined(subject)


def _joined(subject: str) -> Finding:
    import transformers.modeling_utils  # noqa: F401 - what calls qhub in
    from transformers.quantizers import auto

    from qhub.integrations.transformers.quantizer import PluginQuantizer

    served = [
        cls
        for cls in auto.AUTO_QUANTIZER_MAPPING.values()
        if isinstance(cls, type) and issubclass(cls, PluginQuantizer)
    ]
    if served or not registry.list():
        return Finding("ok", subject, "armed: programs that import only transformers find the plugins")
    return Finding(
        "error",
        subject,
        "armed, but transformers has no method of qhub",
        "run python -W always -c 'import transformers.modeling_utils' and look at its warnings",
    )


def _devices() -> Iterator[Finding]:
    import torch

    features = _cpu_features()
    speed = torch.backends.cpu.get_cpu_capability()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        "ok",
        "cpu",
        f"{platform.machine()}, {cores} cores, torch uses {speed}"
        + (f"; has {', '.join(features)}" if features else ""),
    )
    if not torch.accelerator.is_available():
        yield Finding("ok", "accelerator", "none that torch can use; every method runs on the CPU")
        return
    kind = torch.accelerator.current_accelerator()
    for index in range(torch.accelerator.device_count()):
        name = f"{kind.type}:{index}" if kind is not None else str(index)
        about = ""
        if kind is not None and kind.type == "cuda":
            properties = torch.cuda.get_device_properties(index)
            capability = f"compute capability {properties.major}.{properties.minor}"
            about = f"{properties.name}, {capability}, {properties.total_memory / 1e9:.0f} GB"
        yield Finding("ok", name, about or "available")


def _cpu_features() -> list[str]:
    """Return the features that /proc/cpuinfo names; empty where there is no such file."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            have = set(value.split())
            return [feature for feature in _CPU_FEATURES if feature in have]
    return []


def _plugins() -> Iterator[Finding]:
    """Load every plugin, and let each speak for itself."""
    reported = set()
    for group, noun in ((METHOD_GROUP, "method"), (KERNEL_GROUP, "kernels")):
        for name, info in registry.list(group).items():
            subject = f"{noun} {name}"
            if info.clash:
                reported.add(name)
                owners = " and ".join(sorted([info.distribution, *info.clash]))
                yield Finding("error", subject, f"announced by {owners}, so neither is used", "uninstall one of them")
                continue
            try:
                registry.load(name, group)
                served = f", served by {served_by(name)}" if group == METHOD_GROUP else ""
                yield Finding("ok", subject, f"{info.distribution} {info.version}{served}")
            except QhubError as error:
                reported.add(name)
                yield Finding(
                    "error", subject, str(error), f"reinstall or update {info.distribution}, or set QHUB_DISABLE={name}"
                )
    if not registry.list():
        yield Finding(
            "warning",
            "methods",
            "no quantization method is installed",
            "pip install 'qhub-core[all]', or one, such as qhub-hqq",
        )
    for _, findings in registry.broadcast("qhub_doctor", groups=(METHOD_GROUP, KERNEL_GROUP)):
        yield from findings
    for name in sorted(set(registry.failures) - reported):
        yield Finding("error", f"plugin {name}", str(registry.failures[name]), "report it to the plugin's authors")


def _kernel() -> Iterator[Finding]:
    """Say which kernels are offered, and whether the forced one is among them."""
    from qhub.kernels.dispatch import REFERENCE, kernels

    names = [REFERENCE, *kernels()]
    yield Finding("ok", "kernels", ", ".join(names))
    forced = os.environ.get("QHUB_KERNEL")
    if forced and forced in names:
        yield Finding("note", "QHUB_KERNEL", f"forces {forced} for every layer", "unset it to let qhub choose")
    elif forced:
        yield Finding(
            "error", "QHUB_KERNEL", f"forces {forced}, which no plugin offers: every product will fail", "unset it"
        )
