"""Settings for all tests of the repository: hypothesis judges no example by the clock, because CI shares its cores; no
times that the machine's user measured choose their kernels; triton's kernels are interpreted where there is no GPU."""

import os
import tempfile

import torch
from hypothesis import HealthCheck, settings

settings.register_profile("qhub", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qhub")

os.environ["QHUB_CACHE"] = tempfile.mkdtemp(prefix="qhub-cache-")

# Before any test module imports a kernel: triton asks when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
