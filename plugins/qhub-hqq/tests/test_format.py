"""hqq's checkpoint entries: byte for byte both ways, and refused when they contradict each other or the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from qhub_hqq.format import HqqFormat
from qhub_hqq.settings import Settings
from torch import Tensor

from qhub.errors import LayoutError


def _format(settings: Settings) -> HqqFormat:
    return HqqFormat({None: settings})


def test_reading_gives_the_weights_that_hqq_gives(known: Any) -> None:
    layout, parts = _format(known.settings).unpack(known.layout, known.entries)
    layout.validate(parts)
    assert layout == known.layout
    assert torch.equal(layout.dequantize(parts, known.dequantized.dtype), known.dequantized)


def test_writing_gives_the_bytes_that_were_read(known: Any, same_bytes: Callable[[Tensor, Tensor], bool]) -> None:
    fmt = _format(known.settings)
    layout, parts = fmt.unpack(known.layout, known.entries)
    written = fmt.pack(layout, parts, known.dequantized.dtype)
    assert set(written) == set(known.entries)
    different = [name for name in written if not same_bytes(written[name], known.entries[name])]
    assert different == []


def test_every_entry_is_declared(known: Any) -> None:
    fmt = _format(known.settings)
    declared = fmt.entries(known.layout)
    assert set(known.entries) <= set(declared) <= fmt.names
    for name, entry in known.entries.items():
        assert declared[name].shape in (None, tuple(entry.shape)), name
        assert entry.dtype in declared[name].dtypes, name
    assert {name for name, entry in declared.items() if entry.required} == {"W_q", "scale", "zero"}


def test_metadata_may_be_missing(four_bit: Any) -> None:
    entries = {name: four_bit.entries[name] for name in ("W_q", "scale", "zero")}
    layout, parts = _format(four_bit.settings).unpack(four_bit.layout, entries)
    assert torch.equal(layout.dequantize(parts), four_bit.dequantized)


def test_codes_stored_as_floats_are_read_whatever_the_config_says(four_bit: Any) -> None:
    entries = four_bit.copy()
    entries["W_q"] = entries["W_q"].view(torch.float32)
    entries["view_as_float"] = torch.tensor(1, dtype=torch.uint8)
    layout, parts = _format(four_bit.settings).unpack(four_bit.layout, entries)
    assert torch.equal(layout.dequantize(parts), four_bit.dequantized)


def test_with_settings_per_layer_the_file_decides(four_bit: Any) -> None:
    """The config plans 2 bits in columns; the file says 4 bits in rows and is right: hqq reads nothing else."""
    planned = Settings(2, 32, 0)
    settings: dict[str | None, Settings] = {"self_attn.q_proj": planned, "mlp.up_proj": four_bit.settings}
    fmt = HqqFormat(settings)
    layout, parts = fmt.unpack(planned.layout(*four_bit.dequantized.shape, "w"), four_bit.entries)
    assert layout == four_bit.layout
    assert torch.equal(layout.dequantize(parts), four_bit.dequantized)
    assert torch.equal(fmt.pack(layout, parts, torch.float32)["round_zero"], four_bit.entries["round_zero"])


def test_with_one_setting_the_file_must_agree(four_bit: Any) -> None:
    planned = Settings(4, 32, 1)
    with pytest.raises(LayoutError, match="groups of 64, the config 4 bits, axis 1, groups of 32"):
        _format(planned).unpack(planned.layout(*four_bit.dequantized.shape, "w"), four_bit.entries)


def _number(value: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


HOSTILE: dict[str, tuple[str, Tensor | None, str]] = {
    "no codes": ("W_q", None, "missing"),
    "no scales": ("scale", None, "missing"),
    "other shape": ("shape", torch.tensor([128, 64]), "128x64, the model's weight is 64x128"),
    "three sizes": ("shape", torch.tensor([64, 128, 1]), "'shape'"),
    "huge shape": ("shape", torch.tensor([1 << 40, 1 << 40]), "'shape'"),
    "five bits": ("nbits", _number(5), "nbits=5"),
    "other bits": ("nbits", _number(2), "the config"),
    "no bits": ("nbits", torch.zeros(0, dtype=torch.int32), "'nbits'"),
    "float bits": ("nbits", torch.tensor(4.0), "'nbits'"),
    "axis 2": ("axis", _number(2), "axis=2"),
    "other axis": ("axis", _number(0), "the config"),
    "group 0": ("group_size", _number(0), "group_size=0"),
    "negative group": ("group_size", _number(-64), "group_size=-64"),
    "ragged group": ("group_size", _number(100), "group_size=100"),
    "other group": ("group_size", _number(32), "the config"),
    "one scale": ("channel_wise", _number(0, torch.uint8), "one scale"),
    "quantized scales": ("quant_scale", _number(1, torch.uint8), "quant_scale"),
    "offloaded": ("offload_meta", _number(1, torch.uint8), "offload_meta"),
    "other packing": ("packing", torch.tensor(list(b"2bit_u8"), dtype=torch.uint8), "packing"),
    "code as dtype": ("unpack_view_dtype", torch.tensor(list(b"exit()"), dtype=torch.uint8), "unpack_view_dtype"),
    "long string": ("packing", torch.zeros(1 << 20, dtype=torch.uint8), "up to 32 ASCII codes"),
    "short codes": ("W_q", torch.zeros(32, 64, dtype=torch.uint8), "'W_q'"),
    "flat codes": ("W_q", torch.zeros(64 * 64, dtype=torch.uint8), "'W_q'"),
    "wide codes": ("W_q", torch.zeros(64, 64, dtype=torch.int32), "'W_q'"),
    "float codes": ("W_q", torch.zeros(64, 16), "'view_as_float' says"),
    "few scales": ("scale", torch.zeros(64, 1), "'scale'"),
    "integer zeros": ("zero", torch.zeros(128, 1, dtype=torch.int32), "'zero'"),
    "two dtypes": ("zero", torch.zeros(128, 1, dtype=torch.float16), "dtypes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_entries_that_cannot_be_are_refused(four_bit: Any, name: str) -> None:
    entry, value, message = HOSTILE[name]
    entries = four_bit.copy()
    if value is None:
        del entries[entry]
    else:
        entries[entry] = value
    with pytest.raises(LayoutError, match=message):
        _format(four_bit.settings).unpack(four_bit.layout, entries)


def test_an_infinite_scale_is_refused(four_bit: Any) -> None:
    entries = four_bit.copy()
    entries["scale"][3] = float("inf")
    layout, parts = _format(four_bit.settings).unpack(four_bit.layout, entries)
    with pytest.raises(LayoutError, match="scales"):
        layout.check_values(parts)


def test_what_is_written_loads_in_the_installed_hqq(known_cases: dict[str, Any]) -> None:
    """Runs where hqq is installed."""
    hqq = pytest.importorskip("hqq.core.quantize")
    for name, known in known_cases.items():
        fmt = _format(known.settings)
        layout, parts = fmt.unpack(known.layout, known.entries)
        dtype = parts["scales"].dtype
        layer = hqq.HQQLinear(None, None, compute_dtype=dtype, device="cpu")
        layer.load_state_dict(fmt.pack(layout, parts, dtype))
        assert torch.equal(layer.dequantize(), layout.dequantize(parts, dtype)), name
