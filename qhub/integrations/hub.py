"""The model card that a saved quantized model carries: method, bits measured, base model, how to load; tags for the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["card_text", "write_card"]


def card_text(model: Any) -> str:
    """Return the model card of a quantized ``model``: YAML header with tags, then Markdown."""
    from huggingface_hub import ModelCardData

    from qhub.integrations.transformers.saving import bits_per_weight, dtype_name
    from qhub.registry import registry

    quantizer = model.hf_quantizer
    method = quantizer.method
    bits, count, total = bits_per_weight(model)
    base = str(getattr(model.config, "_name_or_path", "") or "")
    # A local path says nothing to others, and is nobody's business.
    base_model = base if base and base.count("/") <= 1 and not base.startswith((".", "/", "~")) and not Path(base).exists() else None
    data = ModelCardData(
        library_name="transformers",
        tags=["qhub", method, "quantized", f"{round(bits)}-bit"],
        base_model=base_model,
        pipeline_tag="text-generation" if model.can_generate() else None,
    )
    plugin = registry.list()[method]
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {type(model).__name__}, quantized with {method}",
        "",
        "| | |",
        "|---|---|",
        f"| method | `{method}` ({plugin.distribution} {plugin.version}) |",
        f"| bits per quantized weight | {bits:.3f}, scales and zeros counted |",
        f"| quantized weights | {count:,} in {len(quantizer.plan)} tensors |",
        f"| size of all parameters | {total:,} bytes |",
        f"| other weights | {dtype_name(model.dtype)} |",
        *([f"| base model | [{base_model}](https://huggingface.co/{base_model}) |"] if base_model else []),
        "",
        "## Load it",
        "",
        "```python",
        f"# pip install {plugin.distribution}",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_REPO")',
        "```",
        "",
        f"The files are in the format that the field uses for {method}, so other libraries that read it load them too.",
        "",
    ]
    return "\n".join(lines)


def write_card(model: Any, folder: Path) -> None:
    """Write ``README.md`` into ``folder``."""
    (folder / "README.md").write_text(card_text(model), encoding="utf-8")
