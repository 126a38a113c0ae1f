"""Checks on the method's layouts that a wrong kernel is caught, a right one runs, and forcing never falls back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from qhub.errors import KernelError
from qhub.kernels import dispatch
from qhub.registry import KERNEL_GROUP, registry
from qhub.tensor import QuantizedTensor
from qhub.testing.conformance import sabotage
from qhub.testing.conformance.subject import KitBase, Subject
from qhub.testing.conformance.workbench import Workbench, matrices_of, quantized_weights

__all__ = ["KernelChecks"]

_PLUGIN = "qhub-conformance"


class KernelChecks(KitBase):
    """Offers kernels of its own to the dispatcher, in float32, where 1 % is far outside what rounding explains."""

    @pytest.fixture
    def offer(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, list[QuantizedTensor]], None]]:
        """Give a function that offers a kernel for the layouts of some weights, until the test ends."""

        def register(name: str, function: str, weights: list[QuantizedTensor]) -> None:
            layouts = [weight.quant_layout for weight in weights]
            registry.register(sabotage.Offer(name, function, layouts), _PLUGIN, KERNEL_GROUP)
            dispatch.forget()

        monkeypatch.delenv("QHUB_KERNEL", raising=False)
        sabotage.runs.clear()
        yield register
        registry.unregister(_PLUGIN, KERNEL_GROUP)
        dispatch.forget()

    def _matrices(self, subject: Subject, bench: Workbench) -> list[QuantizedTensor]:
        """Return one matrix per layout."""
        found: dict[object, QuantizedTensor] = {}
        for weight in quantized_weights(bench.model(subject)).values():
            found.setdefault(weight.quant_layout, next(matrices_of(weight)))
        return list(found.values())

    @pytest.mark.filterwarnings("ignore:.*wrong result.*:RuntimeWarning")
    def test_wrong_kernel_is_refused(self, single: Subject, bench: Workbench, offer: Callable) -> None:
        """A kernel that is 1 % off is refused with a reason, and does not compute the layer."""
        matrices = self._matrices(single, bench)
        expected = [_product(matrix) for matrix in matrices]
        offer(sabotage.WRONG, "wrong", matrices)
        for matrix, before in zip(matrices, expected, strict=True):
            name = f"{sabotage.WRONG}-{matrix.quant_layout.kind}"
            choice = dispatch.choose(matrix.quant_layout, matrix.parts, torch.float32)
            assert "differs from the reference" in choice.refused.get(name, ""), (
                f"{name} was not refused: {choice.refused}"
            )
            assert all(name != chosen for _, chosen, _ in choice.steps)
            sabotage.runs.clear()
            assert torch.equal(_product(matrix), before)
            assert not sabotage.runs, "the refused kernel ran"

    @pytest.mark.filterwarnings("ignore:.*wrong result.*:RuntimeWarning")
    def test_forcing_a_wrong_kernel_raises(
        self, single: Subject, bench: Workbench, offer: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """QHUB_KERNEL naming it is an error that says why, never another kernel in silence."""
        matrices = self._matrices(single, bench)
        offer(sabotage.WRONG, "wrong", matrices)
        for matrix in matrices:
            name = f"{sabotage.WRONG}-{matrix.quant_layout.kind}"
            monkeypatch.setenv("QHUB_KERNEL", name)
            with pytest.raises(KernelError, match="differs from the reference"):
                _product(matrix)
        monkeypatch.setenv("QHUB_KERNEL", "no-such-kernel")
        with pytest.raises(KernelError, match="no such kernel"):
            _product(matrices[0])

    def test_right_kernel_computes_the_layer(self, single: Subject, bench: Workbench, offer: Callable) -> None:
        """A kernel that agrees with the reference is chosen, and it is the one that runs."""
        matrices = self._matrices(single, bench)
        offer(sabotage.RIGHT, "right", matrices)
        for matrix in matrices:
            choice = dispatch.choose(matrix.quant_layout, matrix.parts, torch.float32)
            assert choice.name(1) == f"{sabotage.RIGHT}-{matrix.quant_layout.kind}", choice.refused
            sabotage.runs.clear()
            _product(matrix)
            assert sabotage.runs == [sabotage.RIGHT]

    def test_explain_covers_every_weight(self, single: Subject, bench: Workbench) -> None:
        """explain() names a kernel for every quantized weight and a reason for each that was refused."""
        from qhub import explain

        model = bench.model(single)
        said = explain(model)
        assert {layer.name for layer in said.layers} == set(quantized_weights(model))
        for layer in said.layers:
            assert layer.kernels, f"no kernel for {layer.name}"
            assert all(reason for reason in layer.refused.values()), f"{layer.name}: refused without a reason"
        assert str(said)


def _product(weight: QuantizedTensor) -> torch.Tensor:
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(4))
    # The weight's own compute dtype may be too coarse to tell 1 %.
    alone = QuantizedTensor.build(weight.quant_layout, weight.parts, torch.float32)
    with torch.no_grad():
        return torch.nn.functional.linear(x, alone)
