"""Lets any method that calibrates do so with few and short samples: what the kit checks does not hang on good data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from qhub.testing.conformance.models import VOCABULARY

__all__ = ["FEW", "calibrate_with_few"]

_SAMPLES, _TOKENS = 16, 16
# Two of four experts see each token, so each one gets about 128: above what counts as too few.
FEW: Mapping[str, Any] = {
    "data": torch.randint(VOCABULARY, (_SAMPLES, _TOKENS), generator=torch.Generator().manual_seed(0)).tolist(),
    "samples": _SAMPLES,
    "length": _TOKENS,
}


def calibrate_with_few(patch: pytest.MonkeyPatch, changes: Mapping[str, Any]) -> None:
    """Give :data:`FEW`, with ``changes``, to every calibration of this process, whatever the method's config asks for.

    Both are fields of :class:`qhub.calibration.CalibrationOptions`. What a caller of the engine gives wins over them.
    """
    from qhub.integrations.transformers import calibrating

    original = calibrating.options_of

    def options_of(method: str, config: Any, **given: Any) -> Any:
        asked = {name: value for name, value in given.items() if value is not None}
        return original(method, config, **{**FEW, **changes, **asked})

    patch.setattr(calibrating, "options_of", options_of)
