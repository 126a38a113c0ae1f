"""The example plugin passes the conformance kit."""

from __future__ import annotations

from qhub.testing import MethodConformance


class TestPow2(MethodConformance):
    method = "pow2"
    configs = [{"group_size": 32}, {"group_size": 64}, {}]
    bad_configs = [{"group_size": 0}, {"group_size": 48}, {"group_size": "many"}]
    native_packages = ("pow2_native",)
    min_sqnr = {0: 14.5}
