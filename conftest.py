"""Settings for all tests of the repository: hypothesis judges no example by the clock, because CI shares its cores."""

from hypothesis import HealthCheck, settings

settings.register_profile("qhub", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qhub")
