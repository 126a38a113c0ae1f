"""Settings for all tests of the repository: hypothesis judges no example by the clock, because CI shares its cores; and
no times that the machine's user measured choose their kernels."""

import os
import tempfile

from hypothesis import HealthCheck, settings

settings.register_profile("qhub", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qhub")

os.environ["QHUB_CACHE"] = tempfile.mkdtemp(prefix="qhub-cache-")
