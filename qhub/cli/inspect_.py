"""``qhub inspect``: what is in a quantized checkpoint: layouts, bits per weight, shares, kernels, what was skipped."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qhub.cli.list_ import by_plugin
from qhub.cli.loading import (
    DeviceMap,
    Model,
    load_config,
    load_model,
    local_folder,
    parse_device_map,
    weight_files,
    weight_sizes,
)
from qhub.cli.measure import bits_on_disk, groups_of, layout_text, quantizer_of, shares_of, skips_by_reason
from qhub.cli.output import Json, emit, size, table, working

__all__ = ["inspect"]


def inspect(
    model: Model,
    modules: Annotated[
        bool, typer.Option("--modules", help="List every weight with its layout, bits and bytes.")
    ] = False,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Look into a quantized model: method, layouts, bits per weight, what was left as it is and why.

    Everything is measured on the files and on the loaded model; nothing is
    taken from the config's word. Shares are of the bytes that the weights
    take unquantized.

    \b
    Examples:
      qhub inspect ./model-nf4
      qhub inspect ./model-nf4 --modules
      qhub inspect ./model-nf4 --json
    """
    places = parse_device_map(device_map)
    with working():
        method = _method_of(model)
        plugin = method is not None and by_plugin(method)
        loaded = load_model(model, dtype="auto", device_map=places) if plugin else None
        sizes = weight_sizes(model)
        data: dict[str, Any] = {
            "model": model,
            "method": method,
            "plugin": plugin,
            "bytes_on_disk": sum(sizes),
            "files": len(sizes),
        }
        if loaded is not None:
            data |= _measured(loaded, weight_files(local_folder(model)))
    emit(as_json, data, *_shown(data, modules))


def _method_of(model: str) -> str | None:
    """Return the method that the model's config names; None for an unquantized one.

    Raises :class:`UnknownMethodError` when neither transformers nor a plugin serves it.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    from qhub.integrations.transformers import install

    install()
    config = getattr(load_config(model), "quantization_config", None)
    if config is None:
        return None
    AutoHfQuantizer.supports_quant_method(config)
    method = (config if isinstance(config, dict) else config.to_dict()).get("quant_method")
    return str(getattr(method, "value", method))


def _measured(model: Any, files: list[Any]) -> dict[str, Any]:
    from qhub.kernels import explain
    from qhub.registry import registry

    quantizer = quantizer_of(model)
    info = registry.list()[quantizer.method]
    kernels = {layer.name: layer.kernels for layer in explain(model).layers}
    groups, modules, shares = groups_of(model), _modules(model), shares_of(model)
    count = sum(group.parameters for group in groups)
    layouts = []
    for group in groups:
        spans: dict[str, list[str]] = {}
        for name in group.names:
            spans.setdefault(", ".join(f"M {span}: {kernel}" for span, kernel in kernels[name].items()), []).append(
                name
            )
        layouts.append(
            {
                "layout": group.layout,
                "text": layout_text(group.layout),
                "weights": len(group.names),
                "parameters": group.parameters,
                "bytes": group.bytes,
                "bits_per_weight": group.bits_per_weight,
                "kernels": {text: len(names) for text, names in spans.items()},
            }
        )
    return {
        "package": f"{info.distribution} {info.version}",
        "config": quantizer.quantization_config.to_dict(),
        "bits_per_weight": 8 * sum(group.bytes for group in groups) / count,
        "bits_per_weight_on_disk": bits_on_disk(model, files),
        "quantized_parameters": count,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes_in_memory": sum(module["bytes"] for module in modules),
        "share_of_all_parameters": shares.all_parameters,
        "share_of_linear_and_experts": shares.linear,
        "layouts": layouts,
        "skipped": skips_by_reason(quantizer),
        "modules": modules,
    }


def _modules(model: Any) -> list[dict[str, Any]]:
    from qhub.tensor import QuantizedTensor

    skipped = quantizer_of(model).skipped
    rows = []
    for name, weight in model.named_parameters():
        quantized = isinstance(weight, QuantizedTensor)
        count = weight.nbytes if quantized else weight.numel() * weight.element_size()
        rows.append(
            {
                "name": name,
                "shape": list(weight.shape),
                "layout": weight.quant_layout.kind if quantized else str(weight.dtype).removeprefix("torch."),
                "bits_per_weight": 8 * count / max(weight.numel(), 1),
                "bytes": count,
                "skipped": skipped.get(name),
            }
        )
    return rows


def _shown(data: dict[str, Any], modules: bool) -> list[Any]:
    rows: list[list[str]] = [["method", data["method"] or "none: not quantized"]]
    on_disk = f"{size(data['bytes_on_disk'])} in {data['files']} weight file{'s' if data['files'] > 1 else ''}"
    if not data["plugin"]:
        rows.append(["on disk", on_disk])
        if data["method"]:
            rows.append(["served by", "transformers itself, no qhub plugin: nothing more is known of its weights"])
        return [table("", [data["model"], ""], rows)]
    bits = f"{data['bits_per_weight']:.3f}"
    if data["bits_per_weight_on_disk"] is not None:
        bits += f" in memory, {data['bits_per_weight_on_disk']:.3f} on disk"
    rows += [
        ["package", data["package"]],
        ["bits per weight", bits],
        ["on disk", on_disk],
        ["in memory", size(data["bytes_in_memory"])],
        ["quantized", f"{data['quantized_parameters']:,} of {data['parameters']:,} parameters"],
        ["share of all parameters", f"{100 * data['share_of_all_parameters']:.1f} %"],
        ["share of linear and expert weights", f"{100 * data['share_of_linear_and_experts']:.1f} %"],
    ]
    shown = [table("", [data["model"], ""], rows)]
    layouts = [
        [
            one["text"],
            one["weights"],
            f"{one['parameters']:,}",
            f"{one['bits_per_weight']:.3f}",
            "\n".join(f"{count} x {text}" for text, count in one["kernels"].items()),
        ]
        for one in data["layouts"]
    ]
    shown.append(table("", ["layout", "weights", "parameters", "bits per weight", "kernels"], layouts))
    if data["skipped"]:
        skipped = [[len(names), reason, _few(names)] for reason, names in data["skipped"].items()]
        shown.append(table("", ["not quantized", "because", "which"], skipped))
    if modules:
        rows = [
            [
                one["name"],
                "x".join(map(str, one["shape"])),
                one["layout"],
                f"{one['bits_per_weight']:.3f}",
                one["bytes"],
            ]
            for one in data["modules"]
        ]
        shown.append(table("", ["parameter", "shape", "stored as", "bits per weight", "bytes"], rows))
    return shown


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
