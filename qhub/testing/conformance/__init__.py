"""The conformance kit: qhub's invariants as tests that a method's author inherits.

Subclass :class:`MethodConformance`, name a method and configs, and pytest finds about fifty tests::

    from qhub.testing import MethodConformance

    class TestHqq(MethodConformance):
        method = "hqq"
        configs = [dict(nbits=4, group_size=32), dict(nbits=3, group_size=64)]
        bad_configs = [dict(nbits=5)]
        native_packages = ("hqq",)

The plugin must be installed (``pip install -e .``): some tests run in a fresh process that imports only transformers.

    discovery.py  installed, loads alone, light to import, hooks spelled right
    configs.py    keys and values: round trip, refusals
    plans.py      meta-device plan, and that quantizing gives what was planned
    formats.py    file entries: bit-exact both ways, and as declared
    roundtrip.py  quantize, save, reload in a fresh process, dequantize, generate, memory
    numerics.py   every layer against float64
    kernels.py    a wrong kernel is caught, a right one is used
    adapters.py   LoRA trains, merges and reloads
    damaged.py    bad checkpoints are refused, the tensor named
    saving.py     a save that fails leaves the previous files whole

What they share: subject.py (what is tested), workbench.py (models made once per class), models.py (tiny architectures),
calibrating.py (few short samples), processes.py (fresh processes), damage.py (ways to break a checkpoint), sabotage.py
(kernels made to be refused).
"""

from qhub.testing.conformance.adapters import AdapterChecks
from qhub.testing.conformance.configs import ConfigChecks
from qhub.testing.conformance.damaged import DamageChecks
from qhub.testing.conformance.discovery import DiscoveryChecks
from qhub.testing.conformance.formats import FormatChecks
from qhub.testing.conformance.kernels import KernelChecks
from qhub.testing.conformance.numerics import NumericsChecks
from qhub.testing.conformance.plans import PlanChecks
from qhub.testing.conformance.roundtrip import RoundTripChecks
from qhub.testing.conformance.saving import SavingChecks

__all__ = ["MethodConformance"]


class MethodConformance(
    SavingChecks,
    DamageChecks,
    AdapterChecks,
    KernelChecks,
    NumericsChecks,
    RoundTripChecks,
    FormatChecks,
    PlanChecks,
    ConfigChecks,
    DiscoveryChecks,
):
    """Checks one method against the invariants of qhub; every attribute is described in :class:`~.subject.KitBase`.

    Tests run from the cheap to the dear (pytest takes the last base class first): read the first failure first.
    """
