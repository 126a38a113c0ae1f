"""``qhub quantize``: quantizes a model with any installed method and saves it with all that a folder needs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qhub.cli import calibration
from qhub.cli.loading import (
    DeviceMap,
    Dtype,
    Model,
    check_target,
    copy_companions,
    load_config,
    local_folder,
    parse_device_map,
    parse_dtype,
    weight_files,
)
from qhub.cli.measure import bits_on_disk, groups_of, layout_text, quantizer_of, skips_by_reason
from qhub.cli.output import Json, emit, say, size, table, working
from qhub.errors import ConfigError, LossError, PluginError

__all__ = ["make_config", "quantize", "settings_of"]


def quantize(
    model: Model,
    method: Annotated[
        str,
        typer.Option(
            "--method", "-m", help="The quantization method; qhub list shows those installed.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to save into.", show_default=False)],
    preset: Annotated[
        str | None, typer.Option(help="One of the method's presets; qhub list --abilities shows them.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per weight, scales not counted.")] = None,
    group_size: Annotated[int | None, typer.Option(help="How many weights share a scale; -1: a whole row.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any key of the method's config; the value is JSON or text. Repeatable."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    max_shard_size: Annotated[str, typer.Option(help="The size from which a new weight file is begun.")] = "50GB",
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also push it to this repository on the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository of --push private.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Save into a folder that holds files already.")
    ] = False,
    dataset: calibration.Dataset = None,
    samples: calibration.Samples = None,
    length: calibration.Length = None,
    batch_size: calibration.BatchSize = None,
    activations: calibration.Activations = None,
    device: calibration.Device = None,
    written_as: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="METHOD", help="Write the result in another method's format, its numbers unchanged."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize a model and save it: weights, config, tokenizer, generation config and a model card.

    Without --preset, --bits, --group-size and --set the method's usual
    settings are taken; with a preset, the other options change it. The
    folder is one that from_pretrained loads, and the method's own library.

    Methods that need data stream: one block of the model is in memory at a
    time. Finished blocks are kept in OUT.partial until the end, so a run that
    was stopped goes on with the same command.

    \b
    Examples:
      qhub quantize ./llama -m hqq -o ./llama-hqq
      qhub quantize ./llama -m hqq --bits 3 --group-size 64 -o ./llama-3bit
      qhub quantize org/name -m bitsandbytes --preset nf4 -o ./name-nf4
      qhub quantize ./llama -m hqq --set axis=0 -o ./llama-axis0
      qhub quantize ./llama -m gptq --bits 4 --dataset texts.jsonl -o ./llama-gptq
      qhub quantize ./llama -m gptq --format compressed-tensors -o ./llama-vllm
    """
    wanted, places = parse_dtype(dtype), parse_device_map(device_map)
    check_target(model, out, overwrite)
    given = {"data": dataset, "samples": samples, "length": length, "batch_size": batch_size, "place": activations}
    chosen = {name: value for name, value in {**given, "device": device}.items() if value is not None}
    # In the method's own format first; what is written as another's is translated from there.
    place = out if written_as is None else out.with_name(f"{out.name}.{method}")
    from qhub.integrations.transformers import install

    install()
    from qhub.integrations.transformers.quantize import load_and_quantize, streams
    from qhub.registry import registry

    with working():
        start = time.perf_counter()
        try:
            quantization = make_config(method, preset, bits, group_size, settings or [])
            _refuse_quantized(model)
            say(f"reading {model} and quantizing it with {method}")
            streamed = streams(method, quantization) and method not in registry.handed_back()
            if streamed:
                loaded = calibration.stream(model, quantization, place, wanted, chosen, overwrite).model
                if not calibration.leads():
                    return
            else:
                loaded = load_and_quantize(model, quantization, chosen, dtype=wanted, device_map=places)
        except ConfigError as error:
            # Every setting came from the command line.
            raise typer.BadParameter(str(error)) from error
        if quantizer_of(loaded) is None:
            raise PluginError(
                f"{method} is handed back to transformers by QHUB_NATIVE: unset it to quantize with the plugin"
            )
        quantized = time.perf_counter() - start
        say(f"saving to {place}")
        if not streamed:
            loaded.save_pretrained(place, max_shard_size=max_shard_size)
        source = local_folder(model)
        companions = copy_companions(source, place)
        measured = _measured(loaded, source, place)
        if written_as is not None:
            measured["bytes_after"] = _translate(place, written_as, out, max_shard_size)
        if push is not None:
            say(f"pushing to {push}")
            if streamed or written_as is not None:
                _push_folder(out, push, private)
            else:
                _push(loaded, out, companions, push, private, max_shard_size)
        data = {
            "model": model,
            "method": method,
            "config": quantizer_of(loaded).quantization_config.to_dict(),
            "out": out,
            "pushed": push,
            "copied": companions,
            "seconds_quantizing": quantized,
            "seconds": time.perf_counter() - start,
            "format": written_as or method,
            **measured,
        }
    emit(as_json, data, *_shown(data))


def _translate(place: Path, method: str, out: Path, max_shard_size: str) -> int:
    """Write the checkpoint in ``place`` into ``out`` as one of ``method``, and remove it; return the new one's bytes.

    What cannot be said in that format raises :class:`LossError`; the checkpoint in its own format is kept then.
    """
    from qhub.integrations.transformers.converting import convert

    say(f"translating to {method}")
    try:
        report = convert(place, method, out, max_shard_size=max_shard_size)
    except LossError as error:
        raise LossError(f"{error}. The quantized model is kept in its own format in {place}") from error
    say(report.summary())
    shutil.rmtree(place)
    return sum(file.stat().st_size for file in weight_files(out))


def make_config(method: str, preset: str | None, bits: int | None, group_size: int | None, settings: list[str]) -> Any:
    """Return the config object that the options stand for.

    ``preset``: None for the method's usual one when no other option is given. ``settings``: ``"key=value"``. A method
    that is not installed and a preset that it does not have are wrong usage. Raises :class:`ConfigError` for values
    that the method does not offer.
    """
    from qhub.registry import registry

    if method not in registry.list() and method not in registry.disabled():
        installed = ", ".join(registry.list()) or "none"
        raise typer.BadParameter(
            f"no installed plugin serves {method!r} (installed: {installed}): "
            f"pip install qhub-{method.replace('_', '-')}",
            param_hint="--method",
        )
    spec = registry.call(method, "qhub_config")
    if spec is None:
        raise PluginError(f"the plugin {method!r} has no hook qhub_config, so it is no method")
    options = {name: value for name, value in (("bits", bits), ("group_size", group_size)) if value is not None}
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in spec.presets:
            known = ", ".join(spec.presets) or "none: use --bits, --group-size and --set"
            raise typer.BadParameter(f"{method} has no preset {preset!r}; its presets: {known}", param_hint="--preset")
        values |= spec.presets[preset]
    elif spec.presets and not options and not settings:
        values |= next(iter(spec.presets.values()))
    values |= spec.from_options(options) if spec.from_options is not None and options else options
    values |= settings_of(settings)
    return spec.parse({**values, "quant_method": method})


def settings_of(settings: list[str]) -> dict[str, Any]:
    """Return config values from ``"key=value"``; the value is JSON or text."""
    return dict(_setting(text) for text in settings)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        # Python's spellings mean what they say; anything else is text.
        return key.strip(), {"True": True, "False": False, "None": None}.get(value, value)


def _refuse_quantized(model: str) -> None:
    config = getattr(load_config(model), "quantization_config", None)
    if config is not None:
        method = (config if isinstance(config, dict) else config.to_dict()).get("quant_method")
        raise typer.BadParameter(
            f"{model} is quantized already, with {method}: take the unquantized model", param_hint="MODEL"
        )


def _push(model: Any, out: Path, companions: list[str], repo: str, private: bool, max_shard_size: str) -> None:
    from huggingface_hub import HfApi

    model.push_to_hub(repo, private=private, max_shard_size=max_shard_size)
    if companions:
        HfApi().upload_folder(repo_id=repo, folder_path=out, allow_patterns=companions, commit_message="Add tokenizer")


def _push_folder(out: Path, repo: str, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=out, commit_message="Add quantized model")


def _measured(model: Any, source: Path, out: Path) -> dict[str, Any]:
    groups = groups_of(model)
    count = sum(group.parameters for group in groups)
    before, after = (sum(file.stat().st_size for file in weight_files(folder)) for folder in (source, out))
    return {
        "bits_per_weight": 8 * sum(group.bytes for group in groups) / count,
        "bits_per_weight_on_disk": bits_on_disk(model, weight_files(out)),
        "bytes_before": before,
        "bytes_after": after,
        "quantized": [
            {
                "layout": group.layout,
                "text": layout_text(group.layout),
                "weights": group.names,
                "parameters": group.parameters,
                "bits_per_weight": group.bits_per_weight,
            }
            for group in groups
        ],
        "skipped": skips_by_reason(quantizer_of(model)),
    }


def _shown(data: Mapping[str, Any]) -> list[Any]:
    rows = [
        [
            "quantized",
            len(one["weights"]),
            one["text"],
            f"{one['parameters']:,} weights, {one['bits_per_weight']:.3f} bits each",
        ]
        for one in data["quantized"]
    ]
    rows += [
        ["left as it is", len(names), reason, ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")]
        for reason, names in data["skipped"].items()
    ]
    on_disk = "" if data["bits_per_weight_on_disk"] is None else f", {data['bits_per_weight_on_disk']:.3f} on disk"
    before, after = data["bytes_before"], data["bytes_after"]
    ratio = f" ({100 * after / before:.0f} %)" if before else ""
    return [
        table("", ["", "tensors", "how or why", "which"], rows),
        f"bits per weight: {data['bits_per_weight']:.3f} in memory{on_disk}",
        f"weight files: {size(before)} before, {size(after)} after{ratio}",
        f"time: {data['seconds']:.1f} s, {data['seconds_quantizing']:.1f} s of it reading and quantizing",
        f"saved to {data['out']}" + (f", pushed to {data['pushed']}" if data["pushed"] else ""),
    ]
