"""Hypothesis without deadlines: a loaded machine is no bug."""

from hypothesis import HealthCheck, settings

settings.register_profile("hones", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hones")
