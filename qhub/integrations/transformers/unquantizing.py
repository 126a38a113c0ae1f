"""Writes a quantized checkpoint dense, one matrix in memory at a time; and quantizes it anew with another method."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from qhub.errors import CheckpointError, ConfigError, UnsupportedError
from qhub.formats.shards import ShardWriter, byte_count
from qhub.integrations.transformers.conversion import Conversion
from qhub.integrations.transformers.folders import copy_companions
from qhub.integrations.transformers.saving import dtype_name, name_shards, publish, write_model_config
from qhub.integrations.transformers.sources import Source
from qhub.registry import registry

__all__ = ["DENSE", "quantize_anew", "write_config", "write_dense"]

logger = logging.getLogger("qhub")

# The target that is no method: weights as numbers.
DENSE = "dense"


def write_dense(
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
        write_config(source, source.config(), staging)
        publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_config(source: Source, config: Any, staging: Path) -> None:
    config.dtype = dtype_name(source.dtype)
    write_model_config(source.model, config, staging)
    generation = source.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, staging / generation.name)
    copy_companions(source.folder, staging)
    if source.container is not None and not (staging / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(source.folder, gguf_file=source.container).save_pretrained(staging)
        except CheckpointError as error:
            logger.warning("the new checkpoint gets no tokenizer: %s", error)


def quantize_anew(
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
        write_dense(source, Path(folder), dense, byte_count(max_shard_size), torch.float32)
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
        wanted, found = (_logits(model, text) for model in (before, after))
        total += float(kl_divergence(wanted, found).sum())
        report.tokens += wanted.shape[0]
    report.kl = total / max(report.tokens, 1)


def _logits(model: Any, text: dict[str, Any]) -> torch.Tensor:
    """Return the predictions (positions, vocabulary) in float32, on the CPU."""
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in text.items()
    }
    return model(**inputs).logits.float().flatten(0, -2).cpu()


def _length(model: Any) -> int:
    return min(256, getattr(model.config.get_text_config(), "max_position_embeddings", 256) or 256)
