"""Blocks of a toy record: what the core does with records whose bytes it knows nothing of."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.kernels.dense import dense
from qhub.layouts import Affine, Blocks, Grid, Layout, Record, Transform
from qhub.layouts.keys import layout_key, layout_of


class Toy(Record):
    """Three weights in five bytes: a float16 scale, then an int8 each."""

    name, count, size = "TOY", 3, 5

    def decode(self, data: Tensor) -> Tensor:
        return data[..., 2:].view(torch.int8).float() * self.scales(data)

    def scales(self, data: Tensor) -> Tensor:
        return data[..., :2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()

    def nearest(self, weights: Tensor, data: Tensor) -> Tensor:
        codes = (weights / self.scales(data)).round().clamp(-128, 127).to(torch.int8)
        return torch.cat([data[..., :2], codes.view(torch.uint8)], dim=-1)

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Tensor:
        # The weight that counts most is kept exactly.
        scale = weights.abs().amax(-1, keepdim=True) / 127
        if importance is not None:
            chosen = importance.expand(weights.shape).argmax(-1, keepdim=True)
            scale = weights.gather(-1, chosen).abs() / 64
        codes = torch.zeros(*weights.shape[:-1], 5, dtype=torch.uint8)
        codes[..., :2] = scale.clamp_min(1e-6).half().view(torch.uint8)
        return self.nearest(weights, codes)

    def plain(self, out_features: int, in_features: int, blocks: Tensor) -> tuple[Layout, dict[str, Tensor]]:
        data = blocks.unflatten(-1, (-1, 5))
        layout = Affine(out_features=out_features, in_features=in_features, bits=8, signed=True, grid=Grid.along_k(3))
        return layout, {"qweight": data[..., 2:].flatten(-2).view(torch.int8), "scales": self.scales(data).flatten(-2)}

    def from_plain(self, layout: Layout, parts: object) -> Tensor | None:
        return None


def _matrix(rows: int = 4, cols: int = 6, seed: int = 0) -> tuple[Blocks, dict[str, Tensor], Tensor]:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    layout = Blocks(out_features=rows, in_features=cols, record=Toy())
    return layout, layout.fitted(weight), weight


def test_records_are_read_and_written() -> None:
    layout, parts, weight = _matrix()
    layout.validate(parts)
    layout.check_values(parts)
    assert parts["blocks"].shape == (4, 10) and parts["blocks"].dtype == torch.uint8
    assert float((layout.decode(parts) - weight).abs().max()) < float(weight.abs().max()) / 127
    assert layout.columns(parts) is None
    assert layout.describe()["record"] == "TOY"


def test_importance_reaches_the_record() -> None:
    layout, _, weight = _matrix()
    importance = torch.tensor([0.0, 1, 0, 0, 0, 1])
    decoded = layout.decode(layout.fitted(weight, importance))
    assert torch.allclose(decoded[:, [1, 5]], weight[:, [1, 5]], rtol=2.0**-10)


def test_row_that_holds_no_whole_records_is_refused() -> None:
    with pytest.raises(LayoutError, match="TOY.*3.*7"):
        Blocks(out_features=4, in_features=7, record=Toy())


def test_damaged_scale_names_its_rows() -> None:
    layout, parts, _ = _matrix()
    parts["blocks"][2, 6] = 0x7E
    with pytest.raises(LayoutError, match="'blocks'.*TOY"):
        layout.check_values(parts)


def test_rows_are_cut_taken_and_stacked() -> None:
    layout, parts, _ = _matrix()
    whole = layout.decode(parts)
    cut = layout.select_rows(parts, 1, 3)
    taken = layout.take_rows(parts, torch.tensor([3, 3, 0]))
    assert cut is not None and taken is not None
    assert torch.equal(cut[0].decode(cut[1]), whole[1:3])
    assert torch.equal(taken[0].decode(taken[1]), whole[[3, 3, 0]])
    stacked = layout.concat_rows([parts, taken[1]], [layout, taken[0]])
    assert stacked is not None and torch.equal(stacked[0].decode(stacked[1]), torch.cat([whole, whole[[3, 3, 0]]]))


def test_cut_shares_memory() -> None:
    layout, parts, _ = _matrix()
    cut = layout.row_parts(parts, 1, 3)
    assert cut is not None and cut["blocks"].data_ptr() == parts["blocks"][1:].data_ptr()


def test_transforms_surround_the_blocks() -> None:
    layout, parts, _ = _matrix()
    turned = dataclasses.replace(layout, transforms=(Transform("permute", "in"), Transform("permute", "out")))
    parts |= {
        "in_perm": torch.tensor([5, 0, 1, 2, 3, 4], dtype=torch.int32),
        "out_perm": torch.tensor([1, 0, 3, 2], dtype=torch.int32),
    }
    turned.validate(parts)
    plain, own = turned.plain(parts)
    plain.validate(own)
    assert torch.equal(plain.dequantize(own), turned.dequantize(parts))
    again = turned.requantize(turned.dequantize(parts), parts, "keep")
    assert torch.equal(again["blocks"], parts["blocks"])
    # Rows of the dense weight are not those of the file.
    assert turned.take_rows(parts, torch.tensor([0])) is None and turned.select_rows(parts, 0, 2) is None


def test_batch_of_matrices() -> None:
    layout, parts, weight = _matrix()
    batch = {"blocks": torch.stack([parts["blocks"]] * 3)}
    layout.validate(batch)
    assert torch.equal(layout.decode(batch)[2], layout.decode(parts))
    changed = weight.repeat(3, 1, 1) * torch.tensor([1.0, 3, 0.2])[:, None, None]
    best = layout.encode(changed, batch)
    assert torch.equal(best["blocks"][0], parts["blocks"])
    assert float((layout.decode(best) - changed).norm()) < float(
        (layout.decode(layout.nearest(changed, batch)) - changed).norm()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_make_up_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, parts, weight = _matrix(50, 30)
    whole, written = layout.dequantize(parts, dtype), layout.nearest(weight * 1.1, parts)
    for name, size in (("_CPU", 100), ("_PER_THREAD", 1)):
        monkeypatch.setattr(f"qhub.layouts.chunks.{name}", size)
    assert torch.equal(layout.dequantize(parts, dtype), whole)
    assert torch.equal(dense(layout, parts, dtype), whole)
    assert torch.equal(layout.nearest(weight * 1.1, parts)["blocks"], written["blocks"])
    assert torch.equal(layout.fitted(weight)["blocks"], parts["blocks"])


def test_key_is_that_of_the_record() -> None:
    layout, same = (Blocks(out_features=4, in_features=6, record=Toy()) for _ in range(2))
    assert layout == same and layout_key(layout) == layout_key(same)
    assert layout_of(layout_key(layout)) == (layout, ("blocks",))
    assert "Record(TOY)" in repr(layout)
