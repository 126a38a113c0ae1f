"""Orders of rows that convert_hf_to_gguf changes: each function returns int64 ``rows`` with
``parameter[r] == file[rows[r]]``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grouped_heads", "rotary", "split_qkv", "split_qkv_groups"]


def rotary(heads: int, rows: int) -> Tensor:
    """Return the order for q and k of Llama-like models: the file has the two halves of each head interleaved.

    Source: ``LlamaModel.permute`` of convert_hf_to_gguf: reshape(heads, 2, d/2), swap the last two.
    """
    file = torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)
    return torch.argsort(file)


def split_qkv(heads: int, head_dim: int) -> Tensor:
    """Return the order for Bloom's fused q, k, v: (heads, 3, d) in the model, (3, heads, d) in the file.

    Source: ``BloomModel.modify_tensors``.
    """
    return torch.arange(3 * heads * head_dim).view(3, heads, head_dim).transpose(0, 1).reshape(-1)


def split_qkv_groups(heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """Return the order for Falcon's fused q, k, v: for each kv head its q heads, k, v in the model; all q, all k, all v
    in the file. Source: ``FalconModel.modify_tensors``.
    """
    q, k, v = torch.arange((heads + 2 * kv_heads) * head_dim).split(
        [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    )
    shape = (kv_heads, -1, head_dim)
    return torch.cat([q.view(shape), k.view(shape), v.view(shape)], dim=1).reshape(-1)


def grouped_heads(key_heads: int, per_key: int, head_dim: int = 1, before: int = 0) -> Tensor:
    """Return the order for the value heads of a gated delta net: grouped by key head in the model, tiled in the file.

    ``before``: rows ahead of them that keep their places. Source: ``_LinearAttentionVReorderBase`` of
    convert_hf_to_gguf.
    """
    tiled = torch.arange(key_heads * per_key * head_dim).view(per_key, key_heads, head_dim)
    return torch.cat([torch.arange(before), before + tiled.transpose(0, 1).reshape(-1)])
