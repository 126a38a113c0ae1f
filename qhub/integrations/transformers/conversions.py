"""Conversions of transformers' loading loop that go by exact keys: one knows all keys, a copy of it one parameter's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Self

from torch import Tensor, nn
from transformers import core_model_loading as host

__all__ = ["ExactConversion", "Ready"]


class ExactConversion(host.WeightConverter):
    """Takes the keys of ``table``, {key: (parameter, checkpoint key)}, and no other.

    transformers copies a conversion once per parameter: copies share everything but the tensors collected for one.
    """

    def __init__(self, table: Mapping[str, tuple[str, str]]) -> None:
        # The base class compiles its patterns to one expression; exact lookups need none, so it is not initialised.
        self._start()
        self.table = table
        object.__setattr__(self, "source_patterns", [key for _, key in table.values()])

    def _start(self) -> None:
        slots: dict[str, Any] = {
            "source_patterns": [],
            "target_patterns": [""],
            "compiled_sources": None,
            "distributed_operation": None,
            "quantization_operation": None,
            "collected_tensors": defaultdict(list),
            "layer_targets": defaultdict(set),
            "_original_source_patterns": [],
            "_original_target_patterns": [],
            "_was_used": False,
            "scope_prefix": None,
            "base_model_prefix": None,
            "operations": [host._IdentityOp()],
            "force_cpu": False,
        }
        for name, value in slots.items():
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: Any) -> Self:
        copy = object.__new__(type(self))
        copy._start()
        mine = vars(copy)
        vars(copy).update({name: value for name, value in vars(self).items() if name not in mine})
        return copy

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self.table.get(source_key, (source_key, None))

    def was_used(self) -> bool:
        # False: saving reverses conversions that were used, and quantized weights have a way of their own.
        return False

    def materialized(self) -> dict[str, list[Tensor]]:
        """Return the collected tensors by checkpoint key, and forget them."""
        for key, tensors in self.collected_tensors.items():
            self.collected_tensors[key] = [
                t.result() if isinstance(t, Future) else t() if callable(t) else t for t in tensors
            ]
        result: dict[str, Any] = dict(self.collected_tensors)
        self.collected_tensors.clear()
        return result


class Ready(ExactConversion):
    """Puts tensors in place that are ready, under the names of the model's own parameters."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__({name: (name, name) for name in names})

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, nn.Parameter]:
        ((value,),) = self.materialized().values()
        trains = type(value) is Tensor and value.is_floating_point()
        return {layer_name: nn.Parameter(value, requires_grad=trains)}
