"""QuIP#'s checkpoint entries, as its ``QuantizedLinear`` names them (lib/linear/quantized_linear.py)::

    Qidxs        (N, K/32), (N, K/16) or (N, 3K/64) int64: the words of the codes, those of the second code beside them
    SU, SV       (K,), (N,) float16: what inputs and outputs are multiplied by: signs, and a scale, tuned afterwards
    Wscale       () float: another scale; 1 in newer files, where it is in SV
    codebook_id  () int64: 7, 17 or 18
    scaleWH      (K,) float: what inputs are divided by, with rescale_WH

Beside those of ``qkv_proj`` and ``upgate_proj``, which are several layers in one, lie their ``fuse_scales``, (3,) or
(2,) float: what the pieces of the output are multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry, Format, Fusion
from qhub.layouts import Codebook, Layout
from qhub_quip.hadamard import hadamard_matrix
from qhub_quip.lattices import CODEBOOKS, code_tables
from qhub_quip.packing import pack_bytes, pack_e8p, unpack_bytes, unpack_e8p

__all__ = ["FUSIONS", "QuipFormat"]

_FLOATS = (torch.float16, torch.float32, torch.bfloat16)
# Entry, and the part that holds it.
_VECTORS = {"SU": "in_scale", "SV": "out_scale", "scaleWH": "in_divisor"}

# QuIP#'s Llama rotates these outputs together (model/llama.py): all released checkpoints have them so.
FUSIONS = {
    "qkv_proj": Fusion(("q_proj", "k_proj", "v_proj"), "fuse_scales"),
    "upgate_proj": Fusion(("up_proj", "gate_proj"), "fuse_scales"),
}


class QuipFormat(Format):
    """Translates between a lattice layout and the entries that QuIP#'s layers hold, for the codebook of ``config``."""

    def __init__(self, config: Any) -> None:
        self.codebook = config.codebook
        self.kind = CODEBOOKS[config.codebook]

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({"Qidxs"})

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"Qidxs", "Wscale", "codebook_id", *_VECTORS})

    @property
    def fusions(self) -> Mapping[str, Fusion]:
        return FUSIONS

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        assert isinstance(layout, Codebook)
        n, k = layout.out_features, layout.in_features
        parts = layout.part_specs()
        return {
            "Qidxs": Entry((n, sum(k // step for step in self.kind.words)), (torch.int64,)),
            "Wscale": Entry((), _FLOATS),
            "codebook_id": Entry((), (torch.int64,)),
            **{name: Entry(parts[part].shape, _FLOATS) for name, part in _VECTORS.items() if part in parts},
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        layout.validate(parts)
        if not isinstance(layout, Codebook) or layout.nbits != self.kind.nbits or not any(layout.folded):
            raise LayoutError(f"QuIP#'s entries hold codes of {self.codebook}, this is {layout.describe()}")
        codes = layout.indices(parts)
        packers = {16: pack_e8p, 8: pack_bytes}
        words = [packers[bits](codes[..., index]) for index, bits in enumerate(self.kind.nbits)]
        return {
            "Qidxs": torch.cat(words, dim=-1),
            "Wscale": parts["scales"].reshape(()),
            "codebook_id": torch.tensor(self.kind.number, device="cpu"),
            **{name: parts[part] for name, part in _VECTORS.items() if part in parts},
        }

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        assert isinstance(layout, Codebook)
        self.check(layout, entries, f"the codebook {self.codebook}")
        surplus = sorted(set(entries) - set(self.entries(layout)))
        if surplus:
            raise LayoutError(f"the entry {surplus[0]!r} does not go with rescale_WH=False")
        device = entries["Qidxs"].device
        if device.type != "meta":
            self._check_values(entries)
        unpackers = {16: unpack_e8p, 8: unpack_bytes}
        widths = [layout.in_features // step for step in self.kind.words]
        words = entries["Qidxs"].split(widths, dim=-1)
        codes = [unpackers[bits](one) for bits, one in zip(self.kind.nbits, words, strict=True)]
        parts = {
            "codes": layout.stored_codes(torch.stack(codes, dim=-1)),
            "codebooks": code_tables(self.codebook).to(device),
            "scales": entries["Wscale"].reshape(1, 1),
            **{part: entries[name] for name, part in _VECTORS.items() if name in entries},
        }
        for transform in layout.transforms:
            if transform.factor > 1:
                assert transform.part is not None
                parts[transform.part] = _factor(transform.factor, transform.side == "in").to(device)
        return layout, parts

    def _check_values(self, entries: Mapping[str, Tensor]) -> None:
        """Raise :class:`LayoutError` for another codebook's entries, and for scales that cannot be."""
        number = int(entries["codebook_id"])
        if number != self.kind.number:
            named = {kind.number: name for name, kind in CODEBOOKS.items()}
            raise LayoutError(
                f"entry 'codebook_id' is {number} ({named.get(number, 'which QuIP# does not have')}), but the config "
                f"says {self.codebook}, which is {self.kind.number}: the file or the config belongs to another model"
            )
        for name in ("Wscale", *_VECTORS):
            value = entries.get(name)
            if value is None:
                continue
            if not bool(torch.isfinite(value).all()):
                raise LayoutError(f"entry {name!r} holds NaN or infinity: the file is damaged")
            if bool((value == 0).any()) or (name in ("Wscale", "scaleWH") and bool((value < 0).any())):
                raise LayoutError(f"entry {name!r} holds {float(value.min()):g} as a scale: the file is damaged")


@cache
def _factor(order: int, transposed: bool) -> Tensor:
    """Return the Hadamard matrix of an output's rotation, or, transposed, of an input's: QuIP# applies
    ``had_left_T`` (lib/linear/quantized_linear.py). All callers share the tensor."""
    matrix = hadamard_matrix(order)
    return matrix.t().contiguous() if transposed else matrix
