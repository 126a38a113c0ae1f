"""Known answers of bitsandbytes, as fixtures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_bitsandbytes.plan import plan
from safetensors.torch import load_file
from torch import Tensor
from transformers import BitsAndBytesConfig

from qhub.layouts import Layout
from qhub.plan import LayerPlan, WeightInfo

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """Is one known answer: a weight, the config it was quantized with, and the entries that upstream wrote.

    ``input``: None where only the file is known; then ``dequantized`` is upstream's own decoding.
    """

    config: Any
    entries: dict[str, Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype
    input: Tensor | None = None
    dequantized: Tensor | None = None

    @property
    def layout(self) -> Layout:
        planned = plan(self.config, [WeightInfo("weight", *self.shape, self.dtype)])["weight"]
        assert isinstance(planned, LayerPlan)
        return planned.layout


def _grouped(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        groups.setdefault(name, {})[entry] = tensor
    return groups


def _golden() -> dict[str, Case]:
    """Return the cases of make_golden.py by name."""
    tensors = load_file(DATA / "golden.safetensors")
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("scales/")}
    inputs = {key.removeprefix("input/"): tensors.pop(key) for key in list(tensors) if key.startswith("input/")}
    cases = {}
    for name, entries in _grouped(tensors).items():
        settings, shape = name.split("/")
        kind, dtype, *rest = settings.split("-")
        weight = inputs[f"{dtype}/{shape}"]
        if kind == "int8":
            config = BitsAndBytesConfig(load_in_8bit=True)
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=kind,
                bnb_4bit_quant_storage=rest[0],
                bnb_4bit_use_double_quant="nested" in rest,
            )
        cases[name] = Case(config, entries, tuple(weight.shape), weight.dtype, input=weight)  # type: ignore[arg-type]
    return cases


def _upstream() -> dict[str, Case]:
    """Return the layers of strip_checkpoint.py by name."""
    cases = {}
    for name, entries in _grouped(load_file(DATA / "upstream.safetensors")).items():
        dense = entries.pop("dequantized")
        if name.startswith("bnb-int8"):
            config, dtype = BitsAndBytesConfig(load_in_8bit=True), torch.float16
        else:
            config, dtype = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True), torch.float32
        cases[name] = Case(config, entries, tuple(dense.shape), dtype, dequantized=dense)  # type: ignore[arg-type]
    return cases


GOLDEN, UPSTREAM = _golden(), _upstream()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``golden``, ``upstream`` or ``known`` once per case."""
    for name, cases in (("golden", GOLDEN), ("upstream", UPSTREAM), ("known", {**GOLDEN, **UPSTREAM})):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(cases.values()), ids=list(cases))


@pytest.fixture
def known_scales() -> dict[str, Tensor]:
    """Return values and what upstream's quantize_blockwise makes of them, by the names of quantize_scales."""
    return _grouped(load_file(DATA / "golden.safetensors"))["scales"]


@pytest.fixture
def nested_case() -> Case:
    """Return an NF4 case with nested scales, 2 x 256 blocks; its entries may be changed."""
    case = UPSTREAM["bnb-nf4-dq-uint8.down_proj"]
    return Case(case.config, dict(case.entries), case.shape, case.dtype, dequantized=case.dequantized)


@pytest.fixture
def plain_case() -> Case:
    """Return an FP4 case without nested scales; its entries may be changed."""
    case = GOLDEN["fp4-float32-uint8/whole"]
    return Case(case.config, dict(case.entries), case.shape, case.dtype, input=case.input)


@pytest.fixture
def int8_case() -> Case:
    """Return an int8 case; its entries may be changed."""
    case = GOLDEN["int8-float16/ragged"]
    return Case(case.config, dict(case.entries), case.shape, case.dtype, input=case.input)
