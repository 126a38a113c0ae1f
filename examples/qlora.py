"""QLoRA as published: NF4 weights under double-quantized scales, bf16 compute, LoRA on every linear layer.

    python examples/qlora.py  # the embedded 5 M model; a minute on a GPU, some 20 on two cores
    python examples/qlora.py --model FOLDER --sft  # another model, with TRL's SFTTrainer

The text is one that the model has never seen (The Debian Administrator's Handbook); its last part is held out. The same
adapter is trained twice from the same start, with the same batches: on the 16-bit model, and on the same model in NF4.
Both held-out perplexities are drawn over the steps. (Dettmers et al. 2023, "QLoRA", section 3.)
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from qhub.integrations.transformers.optimizers import optimizer_name

HERE = Path(__file__).resolve().parent
MODEL = HERE / "models" / "doclm-5m"
TEXTS = [HERE / "text" / name for name in ("eval_handbook.txt", "handbook_rest.txt")]

# Windows of the text's end that are never trained on.
HELD_OUT = 24

Curve = list[tuple[int, float]]


def windows(folder: str, files: list[Path], length: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (training, held-out) windows of ``length`` tokens: the text's beginning and its end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if len(rows) < 2 * HELD_OUT:
        raise SystemExit(f"the text has {len(rows)} windows of {length} tokens; {2 * HELD_OUT} are needed")
    examples = [{"input_ids": row, "labels": row} for row in rows]
    return examples[:-HELD_OUT], examples[-HELD_OUT:]


def load(folder: str, quantized: bool) -> Any:
    """Return the model in bfloat16, or in NF4 with double-quantized scales and bfloat16 compute."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    arguments = {"quantization_config": config} if quantized else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **arguments)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) if quantized else model


def train(model: Any, data: tuple[list[Any], list[Any]], options: argparse.Namespace, out: str) -> Curve:
    """Train an adapter on ``model`` and return (step, held-out perplexity) from before the first step on."""
    common = dict(
        output_dir=out, max_steps=options.steps, per_device_train_batch_size=options.batch, learning_rate=options.lr,
        per_device_eval_batch_size=options.batch, warmup_steps=max(1, options.steps // 20), optim=options.optim,
        lr_scheduler_type="cosine", eval_strategy="steps", eval_steps=max(1, options.steps // 8), logging_steps=1,
        eval_on_start=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=True, save_strategy="no", report_to=[], disable_tqdm=True, seed=options.seed, prediction_loss_only=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    lora = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    set_seed(options.seed)
    if options.sft:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        tables = [Dataset.from_list([{"input_ids": row["input_ids"]} for row in part]) for part in data]
        arguments = SFTConfig(**common, max_length=options.length, packing=False, loss_type="nll")
        trainer = SFTTrainer(model, args=arguments, train_dataset=tables[0], eval_dataset=tables[1], peft_config=lora)
    else:
        model.enable_input_require_grads()
        adapted = get_peft_model(model, lora)
        trainer = Trainer(adapted, TrainingArguments(**common), train_dataset=data[0], eval_dataset=data[1])
    trainer.train()
    history = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    if options.steps not in history:
        history[options.steps] = trainer.evaluate()["eval_loss"]
    return [(step, math.exp(loss)) for step, loss in sorted(history.items())]


def draw(curves: dict[str, Curve], title: str, file: Path) -> None:
    """Draw the held-out perplexity of both over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=120)
    for (name, curve), style in zip(curves.items(), ("o-", "s--"), strict=True):
        axes.plot(*zip(*curve, strict=True), style, label=name, markersize=5)
    start = next(iter(curves.values()))[0][1]
    axes.axhline(start, color="0.5", linewidth=1, linestyle=":", label="16-bit model, not trained")
    axes.set_xlabel("steps")
    axes.set_ylabel("perplexity on held-out windows")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL), help="folder or repository of a dense model")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS, help="files that make up the text, in order")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    # Rank and dropout are the paper's; so small a model wants a higher rate than its 2e-4.
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optim", default="paged_adamw_8bit", help="the 16-bit model gets the same")
    parser.add_argument("--sft", action="store_true", help="train with TRL's SFTTrainer (pip install trl)")
    parser.add_argument("--out", type=Path, default=Path("qlora-out"), help="folder for qlora.json and qlora.png")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    name, console = Path(options.model).name, Console()
    # For the 16-bit model too: qhub looks after its own models only.
    options.optim = optimizer_name(options.optim)
    data = windows(options.model, options.text, options.length)

    curves: dict[str, Curve] = {}
    for label, quantized in (("16-bit LoRA", False), ("NF4 QLoRA", True)):
        console.print(f"{label}: {options.steps} steps of {options.batch} x {options.length} tokens")
        with tempfile.TemporaryDirectory() as folder:
            curves[label] = train(load(options.model, quantized), data, options, folder)
    dense, quantized_curve = curves.values()
    ratio = quantized_curve[-1][1] / dense[-1][1]

    table = Table(title=f"{name}, held-out perplexity")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, curve in curves.items():
        table.add_row(label, f"{curve[0][1]:.3f}", f"{curve[-1][1]:.3f}")
    console.print(table)
    console.print(f"QLoRA is {100 * (ratio - 1):+.2f} % from 16-bit LoRA after the same steps")
    result = {
        "model": name,
        "text": [file.name for file in options.text],
        "trainer": "SFTTrainer" if options.sft else "Trainer",
        "optim": options.optim,
        **{key: getattr(options, key) for key in ("steps", "batch", "length", "rank", "dropout", "lr", "seed")},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "qhub-core")},
        "date": datetime.date.today().isoformat(),
        "curves": curves,
        "ratio": ratio,
    }
    (options.out / "qlora.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(curves, f"{name}: LoRA on 16 bits and on NF4", options.out / "qlora.png")
    console.print(f"Drawn: {options.out / 'qlora.png'}")
    return result


if __name__ == "__main__":
    main()
