"""What is tested: the attributes that a plugin author sets, and the cases that pytest makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qhub.testing.conformance.calibrating import calibrate_with_few
from qhub.testing.conformance.workbench import Workbench
from qhub.testing.threads import one_thread

__all__ = ["KitBase", "Subject", "label"]


@dataclass(frozen=True)
class Subject:
    """Is one model to test.

    Either ``config`` (index into the class's ``configs``) put on a tiny random ``architecture``, or ``checkpoint``: a
    folder with a quantized model that something else wrote.
    """

    config: int | None = None
    architecture: str | None = None
    checkpoint: Path | None = None


def label(values: Mapping[str, Any]) -> str:
    """Return a short test id for config ``values``."""
    return ",".join(f"{key}={value}" for key, value in values.items()) or "defaults"


def _stored_config(folder: Path) -> dict[str, Any]:
    from qhub.integrations.transformers.companions import config_under_key

    values = json.loads((folder / "config.json").read_text())
    found = values.get("quantization_config") or config_under_key(values)
    assert found, f"{folder}/config.json holds no quantization config"
    return found


class KitBase:
    """Holds what an author sets; :class:`qhub.testing.MethodConformance` brings the tests.

    ``method``: the ``quant_method``, which is the entry point's name.
    ``configs``: values as in a ``config.json``, without ``quant_method``; three that differ in what matters keep the
    run under a minute.
    ``bad_configs``: values that must raise :class:`qhub.errors.ConfigError`, when parsed or when planned for a Llama of
    ``hidden_size``.
    ``can_quantize``: False for a method that only loads; it must give ``checkpoint``.
    ``checkpoint``: a folder with a quantized causal language model (config.json, model.safetensors; a tiny one) that
    the method's own library wrote, or several folders; None for none.
    ``native_packages``: libraries that importing the plugin's entry module must never import.
    ``min_sqnr``: {index of the config: lowest signal-to-noise ratio in dB of a normally distributed weight}.
    ``architectures``: tiny models that each config is put on, of those in :mod:`.models`; the first one also serves
    tests that need only one.
    ``hidden_size``: of those models; a multiple of 16.
    ``calibration``: {field of :class:`qhub.calibration.CalibrationOptions`: value} that replaces what the configs ask
    for, beside the few short samples of :mod:`.calibrating`. A fresh process calibrates as ``configs[0]`` says.
    """

    method: ClassVar[str] = ""
    configs: ClassVar[Sequence[Mapping[str, Any]]] = ()
    bad_configs: ClassVar[Sequence[Mapping[str, Any]]] = ()
    can_quantize: ClassVar[bool] = True
    checkpoint: ClassVar[str | Path | Sequence[str | Path] | None] = None
    native_packages: ClassVar[Sequence[str]] = ()
    min_sqnr: ClassVar[Mapping[int, float]] = {}
    architectures: ClassVar[Sequence[str]] = ("llama", "opt", "qwen3_moe")
    hidden_size: ClassVar[int] = 128
    calibration: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def checkpoints(cls) -> list[Path]:
        """Return the folders of :attr:`checkpoint`."""
        given = cls.checkpoint
        if given is None:
            return []
        return [Path(given)] if isinstance(given, (str, Path)) else [Path(one) for one in given]

    @classmethod
    def all_configs(cls) -> list[dict[str, Any]]:
        """Return :attr:`configs`, then those of the checkpoints."""
        stored = [_stored_config(folder) for folder in cls.checkpoints()]
        return [{k: v for k, v in values.items() if k != "quant_method"} for values in (*cls.configs, *stored)]

    @classmethod
    def subjects(cls, every_architecture: bool) -> Iterator[tuple[str, Subject]]:
        """Yield (test id, subject); one architecture per config unless ``every_architecture``."""
        if cls.can_quantize:
            for index, values in enumerate(cls.configs):
                for architecture in cls.architectures if every_architecture else cls.architectures[:1]:
                    yield f"{label(values)}/{architecture}", Subject(index, architecture)
        for folder in cls.checkpoints():
            yield folder.name, Subject(checkpoint=folder)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make one test per case of the arguments that a test takes: subject, single, values, config, bad_config."""
        cls = type(self)
        cases: dict[str, list[tuple[str, Any]]] = {
            "subject": list(cls.subjects(every_architecture=True)),
            "single": list(cls.subjects(every_architecture=False)),
            "values": [(label(values)[:60], values) for values in cls.all_configs()],
            "config": [(label(values), index) for index, values in enumerate(cls.configs)],
            "bad_config": [(label(values), values) for values in cls.bad_configs],
        }
        for name, made in cases.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, [value for _, value in made], ids=[ident for ident, _ in made])

    @pytest.fixture
    def bench(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
        """Give the models of this class, each made when it is first asked for and kept for the other tests."""
        calibrate_with_few(monkeypatch, self.calibration)
        with one_thread():
            yield Workbench.of(type(self), tmp_path_factory)
