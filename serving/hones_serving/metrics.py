"""The Prometheus metrics of steering. Labels are known tasks, ``blend`` and ``none``, never what a client wrote."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from hones_serving.registry import ProfileRegistry


class Metrics:
    """Counts what is steered how; the gauges are read off `registry` whenever somebody scrapes.

    Raises:
        ValueError: `collector` has these metrics already.
    """

    def __init__(self, registry: ProfileRegistry, collector: CollectorRegistry = REGISTRY) -> None:
        self._requests = Counter(
            "hones_requests_total",
            "Requests admitted, by the task that steers them and by what decided so.",
            ["profile", "route"],
            registry=collector,
        )
        self._tokens = Counter(
            "hones_tokens_total", "Tokens generated, by the task that steered them.", ["profile"], registry=collector
        )
        self._loads = Counter(
            "hones_profile_loads_total",
            "Attempts to load a profile over HTTP: ok, error.",
            ["result"],
            registry=collector,
        )
        loaded = Gauge("hones_profiles_loaded", "Profiles that requests can name.", registry=collector)
        loaded.set_function(lambda: len(registry.tasks()))
        used = Gauge("hones_slots_used", "Different profiles in use at this moment.", registry=collector)
        used.set_function(registry.slots_used)

    def requests(self, profile: str, route: str) -> None:
        """Count a request that was admitted under the label `profile` by `route` (one of routing.ROUTES)."""
        self._requests.labels(profile, route).inc()

    def tokens(self, profile: str, count: int) -> None:
        """Count generated tokens under the label of their request's admission."""
        self._tokens.labels(profile).inc(count)

    def loads(self, result: str) -> None:
        """Count an attempt to load a profile: ``ok`` or ``error``."""
        self._loads.labels(result).inc()
