"""``qhub convert``: a quantized checkpoint written in another method's format, without changing a number; one matrix in
memory at a time.

The target method says how it would hold the source's layouts (hook ``qhub_adopt``); each matrix is then translated and
compared. Where one does not fit exactly nothing is written, unless the caller wants it quantized anew.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhub.errors import ConfigError, LossError, UnsupportedError
from qhub.formats.shards import ShardWriter
from qhub.integrations.transformers.folders import copy_companions
from qhub.integrations.transformers.quantizer import PluginQuantizer, quantizer_for
from qhub.integrations.transformers.saving import name_shards, publish, save_quantized, write_companion
from qhub.integrations.transformers.sources import Matrix, Source
from qhub.integrations.transformers.weights import set_tensor
from qhub.layouts import Layout
from qhub.layouts.translating import translate
from qhub.plan import LayerPlan, Skip
from qhub.quantizing import Quantization
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

__all__ = ["DENSE", "Conversion", "convert"]

logger = logging.getLogger("qhub")

# The target that is no method: weights as numbers.
DENSE = "dense"
_SHOWN = 5
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass
class Conversion:
    """Says what a conversion did.

    ``source``, ``target``: methods. ``weights``: matrices converted. ``losses``: what could not be said exactly, with
    the reason, by matrix; empty: every weight is the same number as before. ``kl``: where weights were quantized anew,
    the mean Kullback-Leibler divergence in nats of the result's predictions from the source's, over ``tokens``
    positions of ``text``. ``seconds``: what it took.
    """

    source: str
    target: str
    weights: int = 0
    losses: dict[str, str] = field(default_factory=dict)
    kl: float | None = None
    tokens: int = 0
    text: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def lossless(self) -> bool:
        """Return whether every weight is the number that it was."""
        return not self.losses

    def summary(self) -> str:
        """Return the report in a sentence or two."""
        if self.lossless:
            return f"{self.weights} weights from {self.source} to {self.target}, without loss: all compared and equal"
        text = f"{self.weights} weights from {self.source} to {self.target}, quantized anew ({_told(self.losses)})"
        return text if self.kl is None else f"{text}; KL {self.kl:.4f} from the source, on {self.tokens} tokens"

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data, for a file."""
        return {**asdict(self), "lossless": self.lossless}


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
        _write_dense(opened, out, report, _bytes(max_shard_size))
    else:
        try:
            target = _Target(opened, to, dict(options or {}))
            report.weights = target.write(out, max_shard_size)
        except LossError as error:
            report.losses = getattr(error, "losses", {"": str(error)})
            if not requantize:
                raise
            _quantize_anew(opened, to, out, report, dict(options or {}), data, samples, max_shard_size)
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
        for matrix in source.matrices():
            layouts[f"{matrix.prefix}.weight"] = matrix.layout.plain(matrix.parts)[0]
        others = [name for name in source.infos() if name not in source.quantizer.plan]
        adoption = registry.call(
            method, "qhub_adopt", layouts=layouts, others=others, options=options, model_config=source.model.config
        )
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
            spec.record(self.config, self.layouts, [name.removesuffix(".weight") for name in others])

    def write(self, out: Path, max_shard_size: int | str) -> int:
        """Translate every matrix into ``out``; return how many. Raises :class:`LossError` before ``out`` is touched."""
        if registry.has(self.method, "qhub_save"):
            return self._in_memory(out, max_shard_size)
        fmt = registry.call(self.method, "qhub_format", config=self.config)
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.converting-", dir=out.parent))
        stored: dict[str, tuple[Layout, torch.dtype]] = {}
        dense: list[str] = []
        try:
            with ShardWriter(staging, _bytes(max_shard_size)) as writer:
                for matrix in self.source.matrices():
                    layout, entries = self._entries(matrix, fmt)
                    stored[matrix.parameter] = layout, self.source.dtype
                    if not self.losses:
                        writer.write(entries)
                if self.losses:
                    raise _lost(self.source, self.method, self.losses)
                for key, tensor in self.source.dense():
                    writer.write({key: tensor})
                    dense.append(key)
                writer.metadata |= fmt.metadata(stored, dense)
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

    def _entries(self, matrix: Matrix, fmt: Any) -> tuple[Layout, dict[str, Tensor]]:
        """Return the file entries of one matrix, read back and compared; {} and a loss noted where that fails."""
        target, parts = self._translated(matrix)
        if not parts:
            return target, {}
        entries = fmt.pack(target, parts, self.source.dtype)
        expected = dict(fmt.entries(target))
        odd = [n for n, e in entries.items() if n not in expected or ((d := expected[n].dtypes) and e.dtype not in d)]
        again, back = fmt.unpack(target, entries) if not odd else (target, {})
        if odd or not torch.equal(again.dequantize(back), target.dequantize(parts)):
            names = ", ".join(odd) or "scales"
            self.losses[matrix.prefix] = f"{self.method} files cannot hold these {names} exactly"
            return target, {}
        return target, {f"{matrix.prefix}.{name}": entry for name, entry in entries.items()}

    def _in_memory(self, out: Path, max_shard_size: int | str) -> int:
        """Translate a model in memory, packed, parameter by parameter: for methods whose files are no safetensors."""
        source = self.source
        loading = {"gguf_file": source.container} if source.container else {}
        model = type(source.model).from_pretrained(source.folder, **loading)
        quantization = Quantization(self.method, self.config)
        plan: dict[str, LayerPlan] = {}
        from qhub.integrations.transformers.saving import matrices_of

        for name, parameter in list(model.named_parameters()):
            if not isinstance(parameter, QuantizedTensor):
                continue
            made = []
            for prefix, found in matrices_of(model, name, parameter, True).items():
                one: Any = found.t() if found.transposed else found
                key = prefix if prefix in self.layouts else name.removesuffix(".weight")
                layout, parts = self._translated(Matrix(key, name, one.quant_layout, dict(one.parts)))
                if parts:
                    made.append(quantization.build(layout, parts, parameter.dtype, None))
            if self.losses:
                continue
            if parameter.ndim == 2 and len(made) == 1:
                set_tensor(model, name, made[0])
            else:
                raise LossError(f"{name} holds fused experts: convert it from its own checkpoint's files instead")
            plan[name] = LayerPlan(made[0].quant_layout)
        if self.losses:
            raise _lost(source, self.method, self.losses)
        quantizer = quantizer_for(self.method, False)(self.config, pre_quantized=True)
        quantizer.plan = plan
        quantizer.adopt(model)
        model.config.name_or_path = str(source.folder)
        save_quantized(model, type(model).save_pretrained, out, max_shard_size=max_shard_size)
        copy_companions(source.folder, out)
        return len(plan)

    def _configs(self, staging: Path) -> None:
        from qhub.integrations.model_card import write_card

        source, model = self.source, self.source.model
        quantizer: PluginQuantizer = quantizer_for(self.method, False)(self.config, pre_quantized=True)
        infos = source.infos()
        for matrix_name, layout in self.layouts.items():
            name = f"{matrix_name}.weight"
            if name in infos and infos[name].experts is None:
                quantizer.plan[name] = LayerPlan(layout)
        config = source.config()
        config.quantization_config = self.config
        model.config = config
        model.hf_quantizer = quantizer
        _write_config(source, config, staging)
        write_companion(model, staging)
        write_card(model, staging)


def _lost(source: Source, method: str, losses: dict[str, str]) -> LossError:
    error = LossError(
        f"{method} cannot hold {len(losses)} of the weights of {source.place} exactly: {_told(losses)}. Nothing was "
        "written. With --requantize the model is quantized anew and the difference measured"
    )
    error.losses = losses  # type: ignore[attr-defined]
    return error


def _told(losses: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in losses.items():
        by_reason.setdefault(reason, []).append(name)
    told = []
    for reason, names in list(by_reason.items())[:_SHOWN]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        told.append(f"{names[0]}{more}: {reason}" if names[0] else reason)
    return "; ".join(told)


def _write_config(source: Source, config: Any, staging: Path) -> None:
    config.architectures = [type(source.model).__name__]
    config.dtype = str(source.dtype).removeprefix("torch.")
    config.save_pretrained(staging)
    model = source.model
    if model.can_generate():
        model.generation_config.save_pretrained(staging)
    generation = source.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, staging / generation.name)
    copy_companions(source.folder, staging)
    if source.container is not None and not (staging / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source.folder, gguf_file=source.container).save_pretrained(staging)


def _write_dense(
    source: Source, out: Path, report: Conversion, max_bytes: int, dtype: torch.dtype | None = None
) -> None:
    """Write every weight dense, in ``dtype``; None: in the model's own."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.converting-", dir=out.parent))
    wanted = dtype or source.dtype
    try:
        with ShardWriter(staging, max_bytes) as writer:
            for matrix in source.matrices():
                dense = matrix.layout.dequantize(matrix.parts)
                if not torch.equal(dense.to(wanted).float(), dense):
                    report.notes = [f"weights are rounded to {str(wanted).removeprefix('torch.')}"]
                info = source.infos()[matrix.parameter]
                dense = dense.to(wanted)
                writer.write({f"{matrix.prefix}.weight": dense.t() if info.kind == "conv1d" else dense})
                report.weights += 1
            for key, tensor in source.dense():
                writer.write({key: tensor})
        name_shards(staging, writer.shards)
        _write_config(source, source.config(), staging)
        publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _quantize_anew(
    source: Source,
    method: str,
    out: Path,
    report: Conversion,
    options: dict[str, Any],
    data: Any,
    samples: int,
    max_shard_size: int | str,
) -> None:
    """Quantize the dense weights of ``source`` with ``method``, and compare the predictions of both."""
    from qhub.integrations.transformers.quantize import quantize

    if not registry.has(method, "qhub_quantize"):
        raise UnsupportedError(f"{method} loads checkpoints and does not quantize: the model cannot be quantized anew")
    spec = registry.call(method, "qhub_config")
    values = options or next(iter(spec.presets.values()), {})
    config = spec.parse({**values, "quant_method": method})
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.dense-", dir=out.parent) as folder:
        dense = Conversion(source.method, DENSE)
        _write_dense(source, Path(folder), dense, _bytes(max_shard_size), torch.float32)
        report.weights = dense.weights
        quantize(folder, config, out=out, data=data)
    _measure(source, out, report, data, samples)


@torch.no_grad()
def _measure(source: Source, out: Path, report: Conversion, data: Any, samples: int) -> None:
    from qhub.calibration import CalibrationOptions
    from qhub.evaluate import kl_divergence
    from qhub.integrations.transformers.calibrating import samples_for

    loading = {"gguf_file": source.container} if source.container else {}
    before = type(source.model).from_pretrained(source.folder, **loading)
    try:
        texts, _ = samples_for(before, CalibrationOptions(data=data, samples=samples, length=_length(before)))
    except ConfigError as error:
        report.notes.append(f"the difference was not measured: {error}")
        return
    report.text = "text that the model wrote" if data is None else "the given text"
    after = type(source.model).from_pretrained(out)
    total = 0.0
    for text in texts:
        wanted, found = (model(**text).logits.float().flatten(0, -2) for model in (before, after))
        total += float(kl_divergence(wanted, found).sum())
        report.tokens += wanted.shape[0]
    report.kl = total / max(report.tokens, 1)


def _length(model: Any) -> int:
    return min(256, getattr(model.config.get_text_config(), "max_position_embeddings", 256) or 256)


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    text = size.strip().upper().removesuffix("B")
    digits = text.rstrip("KMGTI")
    try:
        return math.ceil(float(digits) * _UNITS[text[len(digits) :]])
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{size!r} is no size: give bytes, or a number with KB, MB, GB, KiB, ...") from error
