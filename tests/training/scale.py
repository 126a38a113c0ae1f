"""What every process of a distributed run does; started by ``test_sharding.py``.

Arguments: the file for the results (JSON, written by the first process), the folder of the model, its quantization
config as JSON, and the jobs to do.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from qhub import QuantizedTensor, QuantLinear
from qhub.errors import UnsupportedError
from qhub.layouts import Layout
from qhub.sharding import QuantizedShard

STEPS, BATCH, LENGTH = 3, 4, 24

# One of each kind, and what rows cannot be cut from: groups over all rows, nested scales, blocks, shared tables.
LAYOUTS = (
    *("nf4_nested", "nf4_ragged", "int8_outliers", "hqq3_axis0", "hqq4_axis1", "hqq8_bf16", "gptq4_act_order", "awq"),
    *("aqlm_2x8", "quip_e8p12", "e4m3_ragged_blocks"),
)


def adapted(folder: str, config: dict[str, Any], device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Return the quantized model with a LoRA adapter whose values are the same in every process."""
    import peft

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map=device)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: Any, optimizer: Any, rank: int, world: int, device: Any = "cpu", backward: Any = None) -> list[float]:
    """Return the losses of a few steps on this process's rows of the batches, averaged over the processes."""
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(3, 120, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
        ids = ids[rank::world].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        (backward or Tensor.backward)(loss)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def shards_of(model: nn.Module) -> dict[str, QuantizedShard]:
    found = {name: getattr(parameter, "_local_tensor", None) for name, parameter in model.named_parameters()}
    return {name: local for name, local in found.items() if isinstance(local, QuantizedShard)}


def weights_of(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def same(found: Any, expected: QuantizedTensor) -> bool:
    return isinstance(found, QuantizedTensor) and all(
        torch.equal(found.parts[name].cpu(), part.cpu()) for name, part in expected.parts.items()
    )


class Decoded:
    """Counts dequantizations while it is open."""

    def __enter__(self) -> Decoded:
        self.count, self.original = 0, Layout.dequantize

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            self.count += 1
            return self.original(*args, **kwargs)

        Layout.dequantize = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Layout.dequantize = self.original  # type: ignore[method-assign]


# -- jobs --------------------------------------------------------------------------------------------------------------


def single(accelerator: Accelerator, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train in one process: what the others are held against."""
    model = adapted(folder, config, accelerator.device)
    return {"losses": train(model, optimizer_of(model), 0, 1, accelerator.device)}


def ddp(accelerator: Accelerator, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train with DistributedDataParallel, one process's codes spoilt before: the first one's count."""
    rank, world = accelerator.process_index, accelerator.num_processes
    model = adapted(folder, config, accelerator.device)
    expected = {name: weight.detach().clone() for name, weight in weights_of(model).items()}
    if rank:
        for weight in weights_of(model).values():
            weight.parts["qweight"].bitwise_not_()
    optimizer = optimizer_of(model)
    with Decoded() as decoded:
        model, optimizer = accelerator.prepare(model, optimizer)
    codes = all(same(weight, expected[name]) for name, weight in weights_of(model.module).items())
    losses = train(model, optimizer, rank, world, accelerator.device, accelerator.backward)
    return {"losses": losses, "codes": codes, "decoded": decoded.count, "kind": type(model).__name__}


def fsdp(accelerator: Accelerator, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train with ``fully_shard`` on every decoder layer, then gather the state dictionary."""
    rank, world = accelerator.process_index, accelerator.num_processes
    mesh = init_device_mesh(accelerator.device.type, (world,))
    model = adapted(folder, config, accelerator.device)
    expected = {name: weight.detach().clone() for name, weight in weights_of(model).items()}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with Decoded() as decoded:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    shards = shards_of(model)
    result: dict[str, Any] = {
        "decoded": decoded.count,
        "sharded": set(shards) == set(expected),
        "bytes": {name: shard.nbytes for name, shard in shards.items()},
        "whole": {
            name: sum(p.nbytes for part, p in weight.parts.items() if weight.quant_layout.part_specs()[part].batched)
            for name, weight in expected.items()
        },
        "losses": train(model, optimizer, rank, world, accelerator.device),
        "between_steps": set(shards_of(model)) == set(expected),
    }
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        result["gathered"] = all(same(state[name], weight) for name, weight in expected.items())
        result["adapter"] = sorted(name for name in state if "lora_" in name)[:1]
        try:
            with tempfile.TemporaryDirectory() as out:
                model.base_model.model.save_pretrained(f"{out}/base")
        except UnsupportedError as error:
            result["save"] = str(error)
    return result


def prepared(accelerator: Accelerator, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train with what ``accelerate launch --use_fsdp --fsdp_version 2`` makes of ``Accelerator.prepare``.

    accelerate enters that state for accelerators only; on a CPU it is set by hand, and the rest is its own code.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
        )
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    rank, world = accelerator.process_index, accelerator.num_processes
    model = adapted(folder, config, "cpu")
    expected = {name: weight.detach().clone() for name, weight in weights_of(model).items()}
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    losses = train(model, optimizer, rank, world, accelerator.device, accelerator.backward)
    # Wrapping the optimizer made the state look at its environment again.
    accelerator.state.distributed_type = DistributedType.FSDP
    state = accelerator.get_state_dict(model)
    result = {"losses": losses, "sharded": set(shards_of(model)) == set(expected), "kind": type(model).__name__}
    if rank == 0:
        result["gathered"] = all(same(state[name], weight) for name, weight in expected.items())
    return result


def trainer(accelerator: Accelerator, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train with transformers' ``Trainer`` as this launch made it, and save."""
    world = accelerator.num_processes
    model = adapted(folder, config, "cpu")
    batch = torch.randint(3, 120, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in batch]
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, max_steps=STEPS, per_device_train_batch_size=BATCH // world, learning_rate=1e-2, weight_decay=0.01,
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, gradient_checkpointing=True, use_cpu=accelerator.device.type == "cpu",
        )  # fmt: skip
        made = Trainer(model=model, args=arguments, train_dataset=rows)
        made.train()
        made.save_model(f"{out}/adapter")
        files = sorted(file.name for file in Path(out, "adapter").iterdir()) if accelerator.is_main_process else []
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return {"losses": losses, "sharded": bool(shards_of(made.model)), "files": files, "kind": type(made.model).__name__}


def layouts(accelerator: Accelerator, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Shard a layer of each layout, one of them with an odd number of rows, and fused experts, and use them."""
    from tests.layouts.cases import batch, case

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    wrong: list[str] = []
    for name in LAYOUTS:
        one = case(name)
        for kind, weight in (
            ("matrix", QuantizedTensor.build(one.layout, one.parts, torch.float32)),
            ("experts", QuantizedTensor.build(*batch(name, 3)[:2], torch.float32)),
        ):
            weight = weight.to(accelerator.device)
            module = Experts(weight) if kind == "experts" else layer_of(weight)
            x = torch.randn(2, weight.shape[-1], device=accelerator.device, requires_grad=True)
            expected = module(x)
            (wanted,) = torch.autograd.grad(expected.square().sum(), x)
            with Decoded() as decoded:
                fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy())
                module.unshard()
                module.reshard()
                whole = module.weight.full_tensor()
            y = module(x)
            (found,) = torch.autograd.grad(y.square().sum(), x)
            exact = torch.equal(y, expected) and torch.equal(found, wanted)
            if decoded.count or not same(whole, weight) or not exact:
                wrong.append(f"{name} {kind}")
    return {"wrong": wrong, "count": 2 * len(LAYOUTS)}


class Experts(nn.Module):
    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([nn.functional.linear(x, expert) for expert in self.weight])


def layer_of(weight: QuantizedTensor) -> QuantLinear:
    layer = QuantLinear.hollow(weight.shape[1], weight.shape[0], None, weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def refusals(accelerator: Accelerator, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Ask for what cannot be done."""
    from tests.layouts.cases import case

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    one = case("nf4_nested")

    def layer() -> QuantLinear:
        return layer_of(QuantizedTensor.build(one.layout, one.parts, torch.float32))

    sharded = layer()
    fully_shard(sharded, mesh=mesh)
    local, where = sharded.weight._local_tensor, torch.device(accelerator.device.type)
    attempts: dict[str, Callable[[], Any]] = {
        "pickle": lambda: local.__reduce_ex__(2),
        "compute": lambda: local + 1,
        "write": lambda: local.copy_(torch.zeros(local.shape)),
        "columns": lambda: fully_shard(
            layer(), mesh=mesh, shard_placement_fn=lambda _: torch.distributed.tensor.Shard(1)
        ),
        "fsdp1": lambda: FullyShardedDataParallel(layer(), device_id=where, use_orig_params=True),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "nothing was raised"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job for job in (single, ddp, fsdp, trainer, layouts, refusals, prepared)
}


def main() -> None:
    out, folder, config, *jobs = sys.argv[1:]
    torch.set_num_threads(1)
    accelerator = Accelerator()
    results = {job: JOBS[job](accelerator, folder, json.loads(config)) for job in jobs}
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(results), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    main()
