"""Checks that a bad checkpoint ends in one clear error that names the tensor, and never in a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qhub.errors import ConfigError, QhubError, UnknownMethodError
from qhub.testing.conformance.damage import Checkpoint, Victim, another_dtype, other_shapes, with_first
from qhub.testing.conformance.subject import KitBase, Subject
from qhub.testing.conformance.workbench import Workbench, quantized_weights

__all__ = ["DamageChecks"]

_NOBODY = "qhub_nobody_serves_this"


class DamageChecks(KitBase):
    """Breaks copies of the method's own checkpoint, one thing at a time, in all entries that its format declares."""

    def _good(self, single: Subject, bench: Workbench) -> tuple[Checkpoint, Victim]:
        if bench.container:
            pytest.skip(f"checkpoints of {self.method} are no safetensors: its own tests damage them")
        model = bench.model(single)
        checkpoint = Checkpoint(bench.saved(single))
        return checkpoint, checkpoint.victim(model, bench.format(model))

    def _worth_trying(self, victim: Victim, single: Subject) -> list[str]:
        """Return the entries to damage: optional ones, of which some formats have a dozen, only once."""
        return [local for local in victim.entries if victim.required(local) or not single.config]

    def _refused(
        self, folder: Path, names: Sequence[str], bench: Workbench, kind: type[QhubError] = QhubError, what: str = ""
    ) -> None:
        """Load ``folder``: it must raise, and the message must name one of ``names``."""
        try:
            bench.load(folder)
        except kind as error:
            assert any(name in str(error) for name in names), f"{what}: the error names none of {list(names)}: {error}"
            return
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__} instead of {kind.__name__}: {error}") from error
        pytest.fail(f"{what}: a model was returned")

    def _edited(self, good: Checkpoint, bench: Workbench, key: str, value: Tensor | None) -> Path:
        """Return a copy of the checkpoint with one tensor put in, replaced or (None) taken out."""
        return good.with_tensors(bench.folder("damaged"), {key: value})

    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999], ids=["empty", "in the header", "half", "last bytes"])
    def test_truncated_file(self, single: Subject, kept: float, bench: Workbench) -> None:
        """A download that broke off: the file is named."""
        good, _ = self._good(single, bench)
        folder, file = good.with_bytes(bench.folder("damaged"), lambda raw: raw[: int(len(raw) * kept)])
        self._refused(folder, [file.name], bench, what=f"file cut to {kept:.1%}")

    def test_pickle_file(self, single: Subject, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
        """Weights in a pickle could run code when read: refused."""
        monkeypatch.delenv("QHUB_ALLOW_PICKLE", raising=False)
        good, _ = self._good(single, bench)
        folder, file = good.with_pickle(bench.folder("damaged"))
        self._refused(folder, [file.name], bench, what="weights as pickle")

    def test_missing_entry(self, single: Subject, bench: Workbench) -> None:
        """Every required entry is missed; without an optional one the weight is the same or refused."""
        good, victim = self._good(single, bench)
        for local in self._worth_trying(victim, single):
            folder = self._edited(good, bench, victim.key(local), None)
            if victim.required(local):
                self._refused(folder, [victim.prefix], bench, what=f"{victim.key(local)} missing")
            else:
                self._same_or_refused(folder, victim, single, bench, f"optional {victim.key(local)} missing")

    def test_surplus_entry(self, single: Subject, bench: Workbench) -> None:
        """A tensor that the format has no use for belongs to another format: refused."""
        good, victim = self._good(single, bench)
        fmt = bench.format(bench.model(single))
        surplus = ["qhub_surplus", *sorted(fmt.names - set(victim.declared))]
        for local in surplus:
            folder = self._edited(good, bench, victim.key(local), torch.zeros(3))
            self._refused(folder, [victim.prefix], bench, what=f"surplus {victim.key(local)}")

    def test_surplus_layer(self, single: Subject, bench: Workbench) -> None:
        """A quantized layer that the model does not have: the checkpoint is of another model."""
        good, victim = self._good(single, bench)
        prefix = f"{victim.prefix.rpartition('.')[0]}.qhub_surplus_proj"
        entries = {f"{prefix}.{local}": value for local, value in victim.entries.items()}
        folder = good.with_tensors(bench.folder("damaged"), entries)
        self._refused(folder, [prefix], bench, what=f"surplus layer {prefix}")

    def test_wrong_shape(self, single: Subject, bench: Workbench) -> None:
        """No entry may be longer than its layer, or lie the other way round."""
        good, victim = self._good(single, bench)
        for local in self._worth_trying(victim, single):
            value = victim.entries[local]
            for other in other_shapes(value):
                folder = self._edited(good, bench, victim.key(local), other)
                what = f"{victim.key(local)} of shape {tuple(other.shape)} instead of {tuple(value.shape)}"
                if victim.required(local):
                    self._refused(folder, [victim.prefix], bench, what=what)
                else:
                    self._same_or_refused(folder, victim, single, bench, what)

    def test_wrong_dtype(self, single: Subject, bench: Workbench) -> None:
        """No entry may come in a dtype that the format does not declare."""
        good, victim = self._good(single, bench)
        for local, value in victim.entries.items():
            other = another_dtype(value, victim.declared[local].dtypes)
            if other is None:
                continue
            folder = self._edited(good, bench, victim.key(local), other)
            self._refused(folder, [victim.prefix], bench, what=f"{victim.key(local)} as {other.dtype}")

    @pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=["nan", "infinity"])
    def test_impossible_number(self, single: Subject, number: float, bench: Workbench) -> None:
        """A scale of NaN or infinity is refused; where floats only carry packed bits, the bits are kept."""
        good, victim = self._good(single, bench)
        floats = [local for local, value in victim.entries.items() if value.is_floating_point()]
        refused = 0
        for local in floats:
            changed = with_first(victim.entries[local], number)
            if changed is None:
                continue
            folder = self._edited(good, bench, victim.key(local), changed)
            what = f"{victim.key(local)} holding {number}"
            try:
                model = bench.load(folder)
            except QhubError as error:
                assert victim.prefix in str(error), f"{what}: the error does not name the tensor: {error}"
                refused += 1
                continue
            weight = quantized_weights(model)[f"{victim.prefix}.weight"]
            assert bool(torch.isfinite(weight.dequantize(torch.float32)).all()), f"{what}: it went into the weight"
            packed = bench.format(model).pack(weight.quant_layout, weight.parts, weight.dtype)[local]
            kept = packed.dtype == changed.dtype and torch.equal(_bits(packed), _bits(changed))
            assert kept, f"{what}: it was replaced in silence"
        if not floats:
            pytest.skip(f"{self.method} stores no floating-point entries")
        assert refused or torch.tensor(number).isinf(), f"none of {floats} is checked for {number}"

    def test_unknown_config_key(self, single: Subject, bench: Workbench) -> None:
        """A key that the method does not know may change what the numbers mean: refused."""
        good, _ = self._good(single, bench)
        folder = good.with_config(bench.folder("damaged"), qhub_unknown=1)
        self._refused(folder, ["qhub_unknown"], bench, ConfigError, "unknown key in config.json")

    def test_relabelled_to_an_unknown_method(self, single: Subject, bench: Workbench) -> None:
        """A method that nobody serves: the name and the package are given, and no random weights."""
        good, _ = self._good(single, bench)
        folder = good.with_config(bench.folder("damaged"), quant_method=_NOBODY)
        self._refused(folder, [_NOBODY], bench, UnknownMethodError, "relabelled config.json")

    def test_dense_layer_that_does_not_fit(self, single: Subject, bench: Workbench) -> None:
        """A layer that is stored dense, and does not fit: refused."""
        good, victim = self._good(single, bench)
        layer = quantized_weights(bench.model(single))[f"{victim.prefix}.weight"]
        # Of another shape: a dense layer of the right one is allowed, as methods leave layers out.
        changes: dict[str, Tensor | None] = dict.fromkeys(victim.key(local) for local in victim.entries)
        changes[f"{victim.prefix}.weight"] = layer.dequantize(torch.float32).repeat(1, 2)
        folder = good.with_tensors(bench.folder("damaged"), changes)
        self._refused(folder, [victim.prefix], bench, what="one layer dense and of another shape")

    def test_missing_dense_tensor(self, single: Subject, bench: Workbench) -> None:
        """A tensor that is not quantized is missed too: transformers would fill in random numbers."""
        good, _ = self._good(single, bench)
        key = good.dense_key(bench.format(bench.model(single)))
        folder = self._edited(good, bench, key, None)
        self._refused(folder, [key], bench, what=f"{key} missing")

    def _same_or_refused(self, folder: Path, victim: Victim, single: Subject, bench: Workbench, what: str) -> None:
        try:
            model = bench.load(folder)
        except QhubError as error:
            assert victim.prefix in str(error), f"{what}: the error does not name the tensor: {error}"
            return
        name = f"{victim.prefix}.weight"
        found, expected = (quantized_weights(m)[name].dequantize(torch.float32) for m in (model, bench.model(single)))
        assert torch.equal(found, expected), f"{what}: it loads, in silence, as another weight"


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)
