"""Checks the file entries of every planned layout: bit-exact both ways, and as ``Format.entries`` declares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qhub.formats import Format
from qhub.integrations.transformers.checkpoint import read_headers, sort_entries
from qhub.layouts import Stacked
from qhub.tensor import QuantizedTensor
from qhub.testing.conformance.subject import KitBase, Subject
from qhub.testing.conformance.workbench import Workbench, matrices_of, quantized_weights

__all__ = ["FormatChecks"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FormatChecks(KitBase):
    """Packs and unpacks the quantized weights of the tiny models, one matrix per layout."""

    def _packable(self, subject: Subject, bench: Workbench) -> Iterator[tuple[str, QuantizedTensor, Format]]:
        model = bench.model(subject)
        fmt, seen = bench.format(model), set()
        for name, weight in quantized_weights(model).items():
            # A stacked layout was put together from matrices that lie in the file one by one.
            if weight.quant_layout not in seen and not isinstance(weight.quant_layout, Stacked):
                seen.add(weight.quant_layout)
                yield name, next(matrices_of(weight)), fmt

    @pytest.mark.parametrize("dtype", _DTYPES, ids=["fp32", "bf16", "fp16"])
    def test_pack_and_unpack_are_exact(self, subject: Subject, dtype: torch.dtype, bench: Workbench) -> None:
        """parts -> entries -> parts is the identity, bit by bit, and modifies nothing."""
        for name, matrix, fmt in self._packable(subject, bench):
            before = {key: part.clone() for key, part in matrix.parts.items()}
            entries = fmt.pack(matrix.quant_layout, matrix.parts, dtype)
            kept = {key: entry.clone() for key, entry in entries.items()}
            layout, parts = fmt.unpack(matrix.quant_layout, entries)
            assert layout == matrix.quant_layout, f"{name}: unpack turned {matrix.quant_layout} into {layout}"
            layout.validate(parts)
            for key, part in matrix.parts.items():
                assert _same(part, before[key]), f"{name}: pack changed part {key!r} that it was given"
                assert _same(part, parts[key]), f"{name}: part {key!r} comes back different ({parts[key].dtype})"
            for key, entry in kept.items():
                assert _same(entry, entries[key]), f"{name}: unpack changed entry {key!r} that it was given"

    def test_entries_are_as_declared(self, subject: Subject, bench: Workbench) -> None:
        """What pack writes is what entries() announces: a reader checks files against that."""
        for name, matrix, fmt in self._packable(subject, bench):
            declared = dict(fmt.entries(matrix.quant_layout))
            packed = fmt.pack(matrix.quant_layout, matrix.parts, matrix.dtype)
            assert fmt.markers <= fmt.names, (
                f"markers {sorted(fmt.markers)} are not among the names {sorted(fmt.names)}"
            )
            assert fmt.markers & set(packed), f"{name}: none of the markers {sorted(fmt.markers)} is written"
            assert "weight" not in fmt.markers, "the marker 'weight' would take every dense layer for a quantized one"
            surplus = sorted(set(packed) - set(declared))
            assert not surplus, f"{name}: written but not declared: {surplus}"
            unnamed = sorted(set(declared) - fmt.names)
            assert not unnamed, f"{name}: declared but not in names: {unnamed}"
            missing = sorted(key for key, entry in declared.items() if entry.required and key not in packed)
            assert not missing, f"{name}: required but not written: {missing}"
            for key, tensor in packed.items():
                shape, dtypes = declared[key].shape, declared[key].dtypes
                found = tuple(tensor.shape)
                assert shape is None or found == tuple(shape), f"{name}.{key}: shape {found} is not {shape}"
                assert not dtypes or tensor.dtype in dtypes, f"{name}.{key}: {tensor.dtype} is not in {dtypes}"

    def test_files_hold_the_packed_entries(self, subject: Subject, bench: Workbench) -> None:
        """The saved file stores every quantized weight as entries, and none of them dense."""
        if bench.container:
            pytest.skip(f"checkpoints of {self.method} are no safetensors")
        model = bench.model(subject)
        headers = read_headers(str(file) for file in sorted(bench.saved(subject).glob("*.safetensors")))
        stored, dense = sort_entries(headers, bench.format(model))
        weights = quantized_weights(model)
        plain = {name for name, weight in weights.items() if weight.ndim == 2}
        assert {f"{prefix}.weight" for prefix in stored} >= plain, "some quantized layers are not in the file"
        assert not set(weights) & set(dense), f"stored dense: {sorted(set(weights) & set(dense))}"


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bits."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.numel() == 0:
        return True
    return torch.equal(_bits(first), _bits(second))


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)
