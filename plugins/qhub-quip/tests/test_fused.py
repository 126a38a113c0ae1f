"""Checkpoints as released: queries, keys and values in one matrix, up and gate in another."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_quip.config import QuipConfig
from qhub_quip.format import QuipFormat
from qhub_quip.plan import layout_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qhub import QuantizedTensor
from qhub.errors import CheckpointError
from qhub.plan import WeightInfo

TOKENS = torch.arange(1, 17).reshape(2, 8)


def _random_entries(n: int, k: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the entries of a layer of random codes, and its weight."""
    generator = torch.Generator().manual_seed(seed)

    def signs(size: int) -> Tensor:
        return 2.0 * torch.randint(0, 2, (size,), generator=generator) - 1

    entries = {
        "Qidxs": torch.randint(-(1 << 63), (1 << 63) - 1, (n, k // 32), generator=generator),
        "SU": signs(k).half(),
        "SV": (signs(n) * 0.02).half(),
        "Wscale": torch.tensor(1.0),
        "codebook_id": torch.tensor(7),
    }
    layout = layout_of(QuipConfig(), WeightInfo("w.weight", n, k, torch.float16))
    layout, parts = QuipFormat(QuipConfig()).unpack(layout, entries)
    return entries, layout.dequantize(parts)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of a fused checkpoint, with names and config as released, and that of the dense model."""
    torch.manual_seed(0)
    # 64 + 2 * 32 rows are a power of two; 2 * 96 are 12 times 16.
    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    dense, released = (tmp_path_factory.mktemp(name) for name in ("dense", "released"))
    AutoModelForCausalLM.from_config(config).save_pretrained(dense)
    plain = load_file(dense / "model.safetensors")
    stored = {key: value for key, value in plain.items() if "proj" not in key}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for seed, (name, members) in enumerate(
            {
                "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "self_attn.o_proj": (),
                "mlp.upgate_proj": ("mlp.up_proj", "mlp.gate_proj"),
                "mlp.down_proj": (),
            }.items()
        ):
            sizes = [plain[f"{prefix}.{member}.weight"].shape[0] for member in members or (name,)]
            k = plain[f"{prefix}.{members[0] if members else name}.weight"].shape[1]
            entries, weight = _random_entries(sum(sizes), k, 10 * layer + seed)
            stored |= {f"{prefix}.{name}.{key}": value for key, value in entries.items()}
            if not members:
                plain[f"{prefix}.{name}.weight"] = weight.contiguous()
                continue
            scales = torch.tensor([0.5, 1.25, 2.0][: len(members)])
            stored[f"{prefix}.{name}.fuse_scales"] = scales
            for member, piece, scale in zip(members, weight.split(sizes), scales, strict=True):
                plain[f"{prefix}.{member}.weight"] = (piece * scale).contiguous()
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, released / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((dense / "config.json").read_text())
    values["quip_params"] = {"codebook": "E8P12", "codebook_version": 1, "codesz": 8, "idx_dtype": "torch.int64",
                             "lora_rank": 0, "packsz": 4, "rescale_WH": False, "model_version": 1}  # fmt: skip
    (released / "config.json").write_text(json.dumps(values))
    return released, dense


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def _quantized(model: Any) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def test_a_fused_checkpoint_gives_the_logits_of_its_pieces(fused: tuple[Path, Path]) -> None:
    released, dense = fused
    model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    assert {name.split(".")[-2] for name in _quantized(model)} == {"qkv_proj", "o_proj", "upgate_proj", "down_proj"}
    expected = _logits(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32))
    # Float32 forwards of the same weights: rotated activations here, rotated weights there.
    torch.testing.assert_close(_logits(model), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_the_whole_runs_once_for_all_pieces(fused: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(fused[0], dtype=torch.float32)
    attention, calls = model.model.layers[0].self_attn, []
    attention.qkv_proj.register_forward_hook(lambda *_: calls.append(1))
    _logits(model)
    assert len(calls) == 1 and attention.q_proj._last.held is None
    # Another input, one that was written into, another mode: not what is remembered.
    x = torch.randn(1, 3, 64)
    first = attention.q_proj(x)
    assert not torch.equal(attention.k_proj(x.clone()), first[..., :32])
    attention.q_proj(x)
    before = len(calls)
    with torch.no_grad():
        x.mul_(2)
    changed = attention.k_proj(x)
    assert len(calls) == before + 1
    with torch.no_grad():
        torch.testing.assert_close(changed, attention.qkv_proj(x)[..., 64:96] * 1.25)


def test_it_is_written_back_byte_for_byte(fused: tuple[Path, Path], tmp_path: Path) -> None:
    released, _ = fused
    model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    before, after = load_file(released / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(model))


def test_copies_and_generation_work(fused: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(fused[0], dtype=torch.float32)
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].self_attn.q_proj.whole is twin.model.layers[0].self_attn.qkv_proj
    assert torch.equal(_logits(twin), _logits(model))
    made = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 12)


def test_pieces_compile_and_work_without_gradients_and_with_checkpointing(fused: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(fused[0], dtype=torch.float32)
    expected = _logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(_logits(compiled), expected)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, expected)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()(TOKENS, labels=TOKENS).loss.backward()


def test_dequantizing_gives_the_models_own_layers(fused: tuple[Path, Path], tmp_path: Path) -> None:
    released, dense = fused
    model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32).dequantize()
    model.save_pretrained(tmp_path)
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


def test_adapters_train_and_merge_on_the_whole(fused: tuple[Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(fused[0], dtype=torch.float32)
    names = set(_quantized(model))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    assert any("qkv_proj.lora_A" in name for name, _ in tuned.named_parameters())
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    merged = tuned.eval().merge_and_unload()
    assert set(_quantized(merged)) == names
    with torch.no_grad():
        loss = float(merged(input_ids=TOKENS, labels=TOKENS).loss)
    assert loss < (losses[0] + losses[-1]) / 2
    merged.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(merged))


def test_scales_that_are_missing_are_named(fused: tuple[Path, Path], tmp_path: Path) -> None:
    released, _ = fused
    tensors = load_file(released / "model.safetensors")
    del tensors["model.layers.1.mlp.upgate_proj.fuse_scales"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((released / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.upgate_proj\.fuse_scales"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
