"""Products in pieces are those of the reference, and take no dense weight."""

from __future__ import annotations

import pytest
import torch
from qhub_gguf.records import RECORDS
from qhub_gguf.records.linear import linear
from torch import Tensor

from qhub.kernels import reference
from qhub.layouts import Blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5])
def test_products_are_those_of_the_reference(
    name: str, rows: int, dtype: torch.dtype, references: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Blocks(out_features=8, in_features=512, record=RECORDS[name])
    parts = {"blocks": references[f"{name}.written"]}
    generator = torch.Generator().manual_seed(rows)
    x, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 512), (8,)))
    monkeypatch.setattr("qhub.layouts.chunks._CPU", 3 * 512)
    monkeypatch.setattr("qhub.layouts.chunks._PER_THREAD", 1)
    for given in (None, bias):
        found, wanted = linear(x, layout, parts, given), reference.linear(x, layout, parts, given)
        assert found.dtype == dtype and found.shape == wanted.shape
        # The order of a sum of 512 products may differ, where the number of rows chooses another routine.
        scale = x.double().abs() @ layout.decode(parts).double().abs().t() + bias.double().abs()
        limit = 512 * 2.0**-24 + {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        assert bool(((found.double() - wanted.double()).abs() <= limit * scale).all())


def test_no_more_than_a_piece_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    record = RECORDS["Q8_0"]
    layout = Blocks(out_features=64, in_features=512, record=record)
    parts = layout.fitted(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr("qhub.layouts.chunks._CPU", 4 * 512)
    monkeypatch.setattr("qhub.layouts.chunks._PER_THREAD", 1)
    seen = []
    decode = type(record).decode

    def counting(self: object, data: Tensor) -> Tensor:
        seen.append(data.shape[0])
        return decode(record, data)

    monkeypatch.setattr(type(record), "decode", counting)
    linear(torch.ones(2, 512), layout, parts)
    assert seen == [4] * 16
