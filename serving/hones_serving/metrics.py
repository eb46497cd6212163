"""The Prometheus metrics of steering. Labels are known tasks, ``blend`` and ``none``, never a client's words."""

from __future__ import annotations

import os
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from hones_serving.registry import ProfileRegistry
from hones_steer.errors import DataError

_Mode = Literal["livemostrecent", "livesum"]

# How the gauges of several processes are joined. The last one's: files of earlier processes, however those ended, are
# older and do not count.
_LAST: _Mode = "livemostrecent"
_SUM: _Mode = "livesum"


class Metrics:
    """Counters of requests, tokens and loads, and gauges that follow `registry`, all in `collector`.

    Where PROMETHEUS_MULTIPROC_DIR is set, values are files, which the process that answers a scrape reads. Counters of
    all processes are added up; with `several` API servers also the gauges of what is in use.

    Raises:
        DataError: PROMETHEUS_MULTIPROC_DIR names a folder that cannot be written to.
        ValueError: `collector` has these metrics already.
    """

    def __init__(
        self, registry: ProfileRegistry, collector: CollectorRegistry = REGISTRY, *, several: bool = False
    ) -> None:
        self._registry = registry
        self._requests = Counter(
            "hones_requests_total",
            "Requests whose answer has begun, by the task that steers them and by what decided so.",
            ["profile", "route"],
            registry=collector,
        )
        self._tokens = Counter(
            "hones_tokens_total", "Tokens generated, by the task that steered them.", ["profile"], registry=collector
        )
        self._drafted = Counter(
            "hones_draft_tokens_total",
            "Tokens drafted by speculative decoding, by the task that steered their request.",
            ["profile"],
            registry=collector,
        )
        self._accepted = Counter(
            "hones_accepted_draft_tokens_total",
            "Drafted tokens that the steered model accepted, by the task that steered their request.",
            ["profile"],
            registry=collector,
        )
        self._loads = Counter(
            "hones_profile_loads_total",
            "Attempts to load a profile over HTTP: ok, error.",
            ["result"],
            registry=collector,
        )
        self._unreached = Counter(
            "hones_unreached_defaults_total",
            "Requests that generate on a route that cannot be steered, by the default that did not reach them.",
            ["profile"],
            registry=collector,
        )
        in_use = _SUM if several else _LAST
        self._loaded = _gauge("hones_profiles_loaded", "Profiles that requests can name.", _LAST, collector)
        self._slots = _gauge("hones_slots_used", "Different profiles in use at this moment.", in_use, collector)
        self._in_flight = _gauge(
            "hones_requests_in_flight", "Requests admitted and not yet answered to the end.", in_use, collector
        )
        registry.watch(self._follow)

    def _follow(self) -> None:
        self._loaded.set(self._registry.num_profiles())
        self._slots.set(self._registry.slots_used())
        self._in_flight.set(self._registry.in_flight())

    def requests(self, profile: str, route: str) -> None:
        """Count a request, as its answer begins, under the label `profile` and `route` (one of routing.ROUTES)."""
        self._requests.labels(profile, route).inc()

    def tokens(self, profile: str, count: int) -> None:
        """Count generated tokens under the label of their request's admission."""
        self._tokens.labels(profile).inc(count)

    def drafts(self, profile: str, drafted: int, accepted: int) -> None:
        """Count the tokens that were drafted for a request, and those of them that its model accepted."""
        self._drafted.labels(profile).inc(drafted)
        self._accepted.labels(profile).inc(accepted)

    def loads(self, result: str) -> None:
        """Count an attempt to load a profile: ``ok`` or ``error``."""
        self._loads.labels(result).inc()

    def unreached_defaults(self, profile: str) -> None:
        """Count a request that the routing file's default, with this label, would steer if its route could be."""
        self._unreached.labels(profile).inc()


def _gauge(name: str, about: str, mode: _Mode, collector: CollectorRegistry) -> Gauge:
    """A gauge that has to be set, because files of several processes can hold values only; `mode` says how they join.

    Raises:
        DataError: the folder of these files cannot be written to.
    """
    try:
        return Gauge(name, about, registry=collector, multiprocess_mode=mode)
    except OSError as error:
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        raise DataError(
            f"PROMETHEUS_MULTIPROC_DIR is {folder!r}, where metrics cannot be kept ({error.strerror}); "
            "make the folder, empty, or unset the variable"
        ) from error
