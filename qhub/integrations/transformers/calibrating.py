"""Calibrates models of transformers: samples from their tokenizers, their blocks taken in and given back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from qhub.calibration import Calibration, CalibrationOptions, CalibrationReport
from qhub.calibration.data import check_samples, samples_of
from qhub.calibration.engine import Progress, Workshop
from qhub.errors import ConfigError
from qhub.integrations.transformers.weights import set_tensor
from qhub.registry import registry

if TYPE_CHECKING:
    from qhub.integrations.transformers.quantizer import PluginQuantizer

__all__ = ["bar", "calibrate", "options_of", "samples_for"]

logger = logging.getLogger("qhub")


def options_of(method: str, config: Any, **changes: Any) -> CalibrationOptions:
    """Return the engine's options as the plugin reads them from ``config``; ``changes`` that are not None win."""
    options = registry.call(method, "qhub_calibration", config=config) or CalibrationOptions()
    return dataclasses.replace(options, **{name: value for name, value in changes.items() if value is not None})


def calibrate(
    model: Any,
    quantizer: PluginQuantizer,
    options: CalibrationOptions,
    workshop: Workshop,
    progress: Progress | None = None,
    samples: list[dict[str, Any]] | None = None,
) -> CalibrationReport:
    """Quantize what ``quantizer`` planned for ``model``; ``samples``: None to make them as ``options`` say."""
    infos = quantizer.planned_infos()
    if any(info.kind == "experts" for info in infos.values()):
        # Grouped products hide which token meets which expert.
        model.set_experts_implementation("eager")
    warnings: list[str] = []
    if samples is None:
        samples, warnings = samples_for(model, options)
    shown = progress or bar()
    # Embeddings take tokens, of which there are no statistics; they go last, as the blocks' inputs come from them.
    tables = {name for name, info in infos.items() if info.kind == "embedding"}
    infos = {name: info for name, info in infos.items() if name not in tables}
    plans = {name: plan for name, plan in quantizer.plan.items() if name not in tables}
    calibration = Calibration(model, infos, plans, quantizer.quantization, options, workshop, shown)
    calibration.report.warnings += warnings
    with _as_in_evaluation(model):
        report = calibration.run(samples)
    for name in tables:
        set_tensor(model, name, quantizer.quantize(name, model.get_parameter(name).detach()))
    if tables:
        model.tie_weights()
    return report


@contextmanager
def _as_in_evaluation(model: Any) -> Iterator[None]:
    """Turn dropout off, and caches of keys and values: a block is called many times with what one call was given."""
    training = model.training
    # Encoder and decoder may have configs of their own.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "use_cache")}
    before = {number: config.use_cache for number, config in configs.items()}
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        for number, config in configs.items():
            config.use_cache = before[number]


def samples_for(model: Any, options: CalibrationOptions) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the calibration samples for ``model``, and warnings about them."""
    text = model.config.get_text_config()
    context, vocabulary = (getattr(text, name, None) for name in ("max_position_embeddings", "vocab_size"))
    length = options.length or min(2048, context or 2048)
    if context is not None and length > context:
        raise ConfigError(f"calibration samples of {length} tokens: the model's context is {context}")
    warnings: list[str] = []
    if options.data is None:
        from qhub.integrations.transformers.writing import written_samples

        samples = written_samples(model, loaded_tokenizer(model, options), options, length)
        warnings.append(
            f"no calibration data were given: the model wrote {len(samples)} samples itself; text of the kind that it "
            "will meet is usually better"
        )
    else:
        tokenizer = loaded_tokenizer(model, options)
        samples = samples_of(options.data, tokenizer, options.samples, length)
        template = getattr(tokenizer, "chat_template", None)
        if template is not None and not _looks_like_chat(samples, tokenizer):
            warnings.append(
                "the tokenizer has a chat template and no calibration sample follows it: a chat model is better "
                'calibrated with chats (a jsonl file with "messages")'
            )
    samples = [decoder_tokens(model, sample) for sample in samples]
    warnings += check_samples(samples, vocabulary, context)
    for warning in warnings:
        logger.warning(warning)
    return samples, warnings


def decoder_tokens(model: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Return the sample with tokens for the decoder, where the model has an encoder and none were given."""
    if not getattr(model.config, "is_encoder_decoder", False) or "decoder_input_ids" in sample:
        return sample
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        start = model.generation_config.decoder_start_token_id
    ids = sample.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ConfigError(
            f"calibration samples of a {type(model).__name__} need 'decoder_input_ids' beside {sorted(sample)}"
        )
    # The text itself, shifted right, as in training by copying.
    shifted = torch.cat([torch.full_like(ids[:, :1], start or 0), ids[:, :-1]], dim=1)
    return {**sample, "decoder_input_ids": shifted}


def loaded_tokenizer(model: Any, options: CalibrationOptions, local: bool = False) -> Any:
    """Return the tokenizer that ``options`` name, else the model's own, or None; ``local``: none is downloaded."""
    given = options.tokenizer
    if given is not None and not isinstance(given, str):
        return given
    from transformers import AutoTokenizer

    source = given or model.name_or_path
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if given is not None:
            raise ConfigError(f"no tokenizer can be loaded from {source}: {error}") from error
        logger.debug("no tokenizer beside %s: %s", source, error)
        return None


def _looks_like_chat(samples: list[dict[str, Any]], tokenizer: Any) -> bool:
    try:
        probe = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True, return_dict=False)
    except Exception as error:  # a template is a program: whatever it raises, it cannot be probed
        logger.debug("the chat template cannot be probed: %s: %s", type(error).__name__, error)
        return True
    special = set(probe) & set(tokenizer.all_special_ids) - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if not special:
        return True
    return any(
        bool(torch.isin(s["input_ids"], torch.tensor(sorted(special))).any()) for s in samples if "input_ids" in s
    )


def bar() -> Progress:
    """Return a progress bar with the time left."""
    state: dict[str, Any] = {}

    def show(done: int, total: int, text: str) -> None:
        if "bar" not in state:
            state.update(bar=tqdm(total=total, desc="calibrating", unit="block"), done=0)
        state["bar"].set_postfix_str(text, refresh=False)
        # Counted here: with transformers' progress bars turned off, this is an object that knows no numbers.
        state["bar"].update(done - state["done"])
        state["done"] = done
        if done == total:
            state["bar"].close()

    return show
