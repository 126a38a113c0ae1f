"""The qhub plugin of the method ``mxfp8``: E4M3 codes under a power of two for each 32 along K.

transformers reads such files with its FineGrainedFP8Config (``weight_block_size`` (1, 32), scales in E8M0, also as
bytes): they are fp8's under another name, and so are the hooks.
"""

from __future__ import annotations

from qhub_fp8.plugin import (
    qhub_adapter,
    qhub_calibration,
    qhub_config,
    qhub_format,
    qhub_plan,
    qhub_quantize,
)

__all__ = ["qhub_adapter", "qhub_calibration", "qhub_config", "qhub_format", "qhub_plan", "qhub_quantize"]
