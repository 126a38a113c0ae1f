"""``qhub convert``: a quantized checkpoint written in another method's format, without changing a number; one matrix in
memory at a time.

The target method says how it would hold the source's layouts (hook ``qhub_adopt``); each matrix is then translated and
compared. Where one does not fit exactly nothing is written, unless the caller wants it quantized anew.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhub.errors import ConfigError, LayoutError, LossError
from qhub.formats import Format
from qhub.formats.shards import ShardWriter, byte_count
from qhub.integrations.transformers.conversion import Conversion, told
from qhub.integrations.transformers.folders import copy_companions
from qhub.integrations.transformers.recording import routers
from qhub.integrations.transformers.saving import (
    matrices_of,
    name_shards,
    publish,
    save_quantized,
    write_companion,
)
from qhub.integrations.transformers.sources import Matrix, Source
from qhub.integrations.transformers.unquantizing import DENSE, quantize_anew, write_config, write_dense
from qhub.integrations.transformers.weights import set_tensor
from qhub.layouts import Layout
from qhub.layouts.translating import translate
from qhub.plan import LayerPlan, Skip
from qhub.quantizing import Quantization
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

__all__ = ["Conversion", "convert"]


# Of one matrix in a header, at most as usual, and the words about a tensor: a file that needs more is ended earlier.
_ENTRIES, _WORDS = 6, 256


def convert(
    source: str | Path,
    to: str,
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    requantize: bool = False,
    max_shard_size: int | str = "5GB",
    data: Any = None,
    samples: int = 8,
) -> Conversion:
    """Write the quantized checkpoint ``source`` into the folder ``out`` as one of the method ``to``.

    ``source``: a folder, a repository, or a container file. ``to``: an installed method, or ``"dense"`` for weights
    that are not quantized. ``options``: values of the target's config. ``requantize``: where the target cannot hold the
    numbers, quantize the model anew with it, and measure what that costs on ``samples`` texts of ``data`` (None: the
    model writes them); otherwise that raises :class:`LossError`, and nothing is written. Raises :class:`ConfigError`
    for a source that is not quantized.
    """
    begun = time.perf_counter()
    opened = Source(str(source))
    out = Path(out)
    report = Conversion(opened.method, to)
    if to == DENSE:
        write_dense(opened, out, report, byte_count(max_shard_size))
    else:
        try:
            target = _Target(opened, to, dict(options or {}))
            report.weights = target.write(out, max_shard_size)
        except LossError as error:
            report.losses = getattr(error, "losses", {"": str(error)})
            if not requantize:
                raise
            quantize_anew(opened, to, out, report, dict(options or {}), data, samples, max_shard_size)
    report.seconds = time.perf_counter() - begun
    return report


class _Target:
    """Is the method that a source is translated to: its config, and its layout for each weight."""

    def __init__(self, source: Source, method: str, options: dict[str, Any]) -> None:
        self.source, self.method = source, method
        if method not in registry.list():
            raise ConfigError(
                f"no installed plugin serves {method!r}; there are {', '.join(registry.list())}, and dense"
            )
        if not registry.has(method, "qhub_adopt"):
            raise LossError(f"{method} cannot hold the numbers of other methods: its checkpoints come from it alone")
        layouts: dict[str, Layout] = {}
        self.losses: dict[str, str] = {}
        self.parameters: dict[str, str] = {}
        for matrix in source.matrices():
            layouts[f"{matrix.prefix}.weight"] = matrix.layout.plain(matrix.parts)[0]
            self.parameters[matrix.prefix] = matrix.parameter
        others = [name for name in source.infos() if name not in source.quantizer.plan]
        try:
            adoption = registry.call(
                method, "qhub_adopt", layouts=layouts, others=others, options=options, model_config=source.model.config
            )
        except ConfigError as error:
            if options:
                raise
            # Nobody asked for settings: there are none under which these numbers fit.
            raise LossError(f"{method} cannot hold the weights of {source.place}: {error}") from error
        self.config = adoption.config
        self.layouts: dict[str, Layout] = {}
        for name, layout in adoption.layouts.items():
            if isinstance(layout, Skip):
                self.losses[name.removesuffix(".weight")] = layout.reason
            else:
                self.layouts[name.removesuffix(".weight")] = layout
        missing = set(layouts) - set(adoption.layouts)
        self.losses |= {name.removesuffix(".weight"): f"{method} says nothing of it" for name in missing}
        if self.losses:
            raise _lost(source, method, self.losses)
        spec = registry.call(method, "qhub_config")
        if spec.record is not None:
            dense = [*(name.removesuffix(".weight") for name in others), *routers(source.model)]
            spec.record(self.config, self.layouts, dense)

    def write(self, out: Path, max_shard_size: int | str) -> int:
        """Translate every matrix into ``out``; return how many. Raises :class:`LossError` before ``out`` is touched."""
        if registry.has(self.method, "qhub_save"):
            return self._in_memory(out, max_shard_size)
        fmt = registry.call(self.method, "qhub_format", config=self.config)
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.converting-", dir=out.parent))
        try:
            room = sum(_ENTRIES * (len(prefix) + _WORDS) for prefix in self.layouts) + _WORDS * len(self._dense_names())
            with ShardWriter(staging, byte_count(max_shard_size), self._metadata(fmt), room) as writer:
                for matrix in self.source.matrices():
                    entries = self._entries(matrix, fmt)
                    if not self.losses:
                        writer.write(entries)
                if self.losses:
                    raise _lost(self.source, self.method, self.losses)
                for key, tensor in self.source.dense():
                    writer.write({key: tensor})
            name_shards(staging, writer.shards)
            self._configs(staging)
            publish(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return len(self.layouts)

    def _translated(self, matrix: Matrix) -> tuple[Layout, dict[str, Tensor]]:
        target = self.layouts[matrix.prefix]
        try:
            return target, translate(matrix.layout, matrix.parts, target)
        except LossError as error:
            self.losses[matrix.prefix] = str(error)
            return target, {}

    def _metadata(self, fmt: Format) -> dict[str, str]:
        """Return what the header of each file says. Raises :class:`LossError` where the format wants all experts of a
        parameter in one tensor, which are not in memory together here."""
        if fmt.always_stacks and any(self.source.infos()[name].experts for name in self.parameters.values()):
            raise LossError(f"{self.method} files hold all experts in one tensor: load the model with it instead")
        stored = {self.parameters[prefix]: (layout, self.source.dtype) for prefix, layout in self.layouts.items()}
        return dict(fmt.metadata(stored, self._dense_names()))

    def _dense_names(self) -> list[str]:
        packed = set(self.parameters.values())
        return [name for name in self.source.model.state_dict() if name not in packed]

    def _entries(self, matrix: Matrix, fmt: Format) -> dict[str, Tensor]:
        """Return the file entries of one matrix, read back and compared; {} and a loss noted where that fails."""
        target, parts = self._translated(matrix)
        if not parts:
            return {}
        try:
            entries = fmt.pack(target, parts, self.source.dtype)
        except LayoutError as error:
            self.losses[matrix.prefix] = str(error)
            return {}
        expected = dict(fmt.entries(target))
        odd = [n for n, e in entries.items() if n not in expected or ((d := expected[n].dtypes) and e.dtype not in d)]
        again, back = fmt.unpack(target, entries) if not odd else (target, {})
        if odd or not torch.equal(again.dequantize(back), target.dequantize(parts)):
            names = ", ".join(odd) or "scales or zeros"
            self.losses[matrix.prefix] = f"{self.method} files cannot hold these {names} exactly"
            return {}
        return {f"{matrix.prefix}.{name}": entry for name, entry in entries.items()}

    def _in_memory(self, out: Path, max_shard_size: int | str) -> int:
        """Translate a model in memory, packed, parameter by parameter: for methods whose files are no safetensors."""
        source = self.source
        loading = {"gguf_file": source.container} if source.container else {}
        model = type(source.model).from_pretrained(source.folder, **loading)
        quantization = Quantization(self.method, self.config)
        plan: dict[str, LayerPlan] = {}
        for name, parameter in list(model.named_parameters()):
            if not isinstance(parameter, QuantizedTensor):
                continue
            prefix = next(iter(matrices_of(model, name, parameter, True)))
            target = self.layouts[prefix].with_rows(parameter.quant_layout.out_features)
            made = [self._made(name, one, target, quantization) for one in _single(parameter)]
            if not self.losses:
                value = made[0] if parameter.ndim == 2 else torch.stack(made)
                set_tensor(model, name, value.transpose(-1, -2) if parameter.transposed else value)
                plan[name] = LayerPlan(target)
        if self.losses:
            raise _lost(source, self.method, self.losses)
        from qhub.integrations.transformers.quantizer import quantizer_for

        quantizer = quantizer_for(self.method, False)(self.config, pre_quantized=True)
        quantizer.plan = plan
        quantizer.adopt(model)
        model.config.name_or_path = str(source.folder)
        save_quantized(model, type(model).save_pretrained, out, max_shard_size=max_shard_size)
        copy_companions(source.folder, out)
        return len(plan)

    def _made(self, name: str, one: QuantizedTensor, target: Layout, quantization: Quantization) -> Any:
        try:
            parts = translate(one.quant_layout, one.parts, target)
        except LossError as error:
            self.losses[name.removesuffix(".weight")] = str(error)
            return None
        return quantization.build(target, parts, one.dtype, None)

    def _configs(self, staging: Path) -> None:
        from qhub.integrations.model_card import write_card
        from qhub.integrations.transformers.quantizer import quantizer_for

        source, model = self.source, self.source.model
        quantizer = quantizer_for(self.method, False)(self.config, pre_quantized=True)
        infos = source.infos()
        for matrix_name, layout in self.layouts.items():
            name = f"{matrix_name}.weight"
            if name in infos and infos[name].experts is None:
                quantizer.plan[name] = LayerPlan(layout)
        config = source.config()
        config.quantization_config = self.config
        model.config = config
        model.hf_quantizer = quantizer
        write_config(source, config, staging)
        write_companion(model, staging)
        write_card(model, staging)


def _single(weight: QuantizedTensor) -> list[Any]:
    """Return the (N, K) matrices of a parameter: itself, or its experts."""
    plain: Any = weight.transpose(-1, -2) if weight.transposed else weight
    return [plain] if weight.ndim == 2 else [plain[index] for index in range(weight.shape[0])]


def _lost(source: Source, method: str, losses: dict[str, str]) -> LossError:
    error = LossError(
        f"{method} cannot hold {len(losses)} of the weights of {source.place} exactly: {told(losses)}. Nothing was "
        "written. With --requantize the model is quantized anew and the difference measured"
    )
    error.losses = losses  # type: ignore[attr-defined]
    return error
