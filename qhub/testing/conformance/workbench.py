"""Makes the models of one test class: each quantized once, saved once, and handed out to many tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from qhub.formats import Format
from qhub.layouts import Layout, Stacked
from qhub.registry import registry
from qhub.tensor import QuantizedTensor
from qhub.testing.conformance.models import INPUT, build_config, write_model

if TYPE_CHECKING:
    from qhub.testing.conformance.subject import KitBase, Subject

__all__ = ["Workbench", "bands_of", "matrices_of", "quantized_weights"]

# Dense models are the same for all classes of a run.
_dense: dict[tuple[str, int], Path] = {}
# The class under test; pytest runs one after the other, so an earlier one's models can go.
_benches: dict[type, Workbench] = {}


class Workbench:
    """Gives tests of ``method`` their models; what it gives is shared, so tests only look.

    ``configs``: values without ``quant_method``. ``hidden``: hidden size of the tiny models.
    """

    def __init__(
        self, method: str, configs: Sequence[Mapping[str, Any]], hidden: int, factory: pytest.TempPathFactory
    ) -> None:
        self.method = method
        self.configs = configs
        self.hidden = hidden
        self._factory = factory
        self._models: dict[Subject, Any] = {}
        self._saved: dict[Subject, Path] = {}
        self._kept: dict[str, Any] = {}

    @classmethod
    def of(cls, tests: type[KitBase], factory: pytest.TempPathFactory) -> Workbench:
        """Return the workbench of a test class: the same one for all its tests."""
        # Not a class-scoped fixture: pytest 10 wants those as classmethods, which pytest 8 does not take.
        if tests not in _benches:
            _benches.clear()
            _benches[tests] = cls(tests.method, list(tests.configs), tests.hidden_size, factory)
        return _benches[tests]

    @property
    def container(self) -> bool:
        """Return whether the method's checkpoints are files of its own kind, no safetensors."""
        return registry.has(self.method, "qhub_save")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned the first time it was asked for under ``name``."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def folder(self, name: str) -> Path:
        """Return a new empty folder."""
        return self._factory.mktemp(name)

    def dense(self, architecture: str) -> Path:
        """Return the folder of the dense model."""
        key = (architecture, self.hidden)
        if key not in _dense:
            folder = self._factory.mktemp(f"dense-{architecture}")
            write_model(architecture, self.hidden, folder)
            _dense[key] = folder
        return _dense[key]

    def meta_model(self, architecture: str) -> Any:
        """Return the dense model on the meta device."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(build_config(architecture, self.hidden))

    def values(self, config: int) -> dict[str, Any]:
        """Return the config as a ``config.json`` holds it."""
        return {"quant_method": self.method, **self.configs[config]}

    def parse(self, values: Mapping[str, Any]) -> Any:
        """Return the config object for ``values``, as a ``from_pretrained`` of a checkpoint makes it."""
        return registry.call(self.method, "qhub_config").parse({"quant_method": self.method, **values})

    def format(self, model: Any) -> Format:
        """Return the checkpoint format of a quantized ``model``."""
        return registry.call(self.method, "qhub_format", config=model.hf_quantizer.quantization_config)

    def quantize(self, config: int, architecture: str, **kwargs: Any) -> Any:
        """Return a newly quantized model, which the test may change."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            self.dense(architecture), quantization_config=self.parse(self.configs[config]), **kwargs
        ).eval()

    def load(self, folder: Path) -> Any:
        """Return the model that a checkpoint folder holds, which the test may change."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def model(self, subject: Subject) -> Any:
        """Return the quantized model of ``subject``; shared, so leave it as it is."""
        if subject not in self._models:
            if subject.checkpoint is not None:
                self._models[subject] = self.load(subject.checkpoint)
            else:
                assert subject.config is not None and subject.architecture is not None
                self._models[subject] = self.quantize(subject.config, subject.architecture)
        return self._models[subject]

    def saved(self, subject: Subject) -> Path:
        """Return a folder with the saved model of ``subject``; shared, so copy it before you change it."""
        if subject not in self._saved:
            folder = self.folder("saved")
            self.model(subject).save_pretrained(folder)
            self._saved[subject] = folder
        return self._saved[subject]

    @staticmethod
    def logits(model: Any) -> Tensor:
        """Return the model's logits for a fixed input."""
        with torch.no_grad():
            return model(INPUT).logits


def quantized_weights(model: torch.nn.Module) -> dict[str, QuantizedTensor]:
    """Return the quantized parameters of ``model`` by name."""
    return {name: value for name, value in model.named_parameters() if isinstance(value, QuantizedTensor)}


def matrices_of(weight: QuantizedTensor) -> Iterator[QuantizedTensor]:
    """Yield the (out, in) matrices of ``weight``: itself, or one per expert."""
    if weight.ndim > 2:
        for index in range(weight.shape[0]):
            yield from matrices_of(weight[index])  # type: ignore[arg-type]
    else:
        yield weight.t() if weight.transposed else weight  # type: ignore[misc]


def bands_of(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Yield (prefix of its parts, layout) for each matrix that ``layout`` stacks; itself if it stacks none."""
    if isinstance(layout, Stacked):
        for index, band in enumerate(layout.bands):
            yield f"{index}_", band
    else:
        yield "", layout
