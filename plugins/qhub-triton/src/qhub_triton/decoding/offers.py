"""What this area offers to decode steps, as data."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["offers"]


def offers(device: str) -> Mapping[str, str] | None:
    """Return the fused operations for devices of the type ``device``; None where triton has no compiler for it."""
    if device not in ("cuda", "xpu"):
        return None
    return {
        "add_norm": "qhub_triton.decoding.norms:add_norm",
        "attend_token": "qhub_triton.decoding.attention:attend_token",
        "gate": "qhub_triton.decoding.gating:gate",
        "pick": "qhub_triton.decoding.picking:pick",
    }
