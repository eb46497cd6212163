"""The HTTP side in vLLM's API server: the middleware of section 8's contract, inside vLLM's authentication."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from hones_serving.metrics import Metrics
from hones_serving.middleware import HonesMiddleware, Service
from hones_serving.registry import LISTING, Admission
from hones_serving.routing import RoutingPlan
from hones_serving.routing_file import load_plan
from hones_serving.settings import Settings
from hones_serving.vllm.front import TICKET, attach
from hones_steer.errors import StateError


class Endpoint:
    """A `vllm.endpoint_plugins` plugin; does nothing unless HONES_PROFILES is set."""

    name = "hones"
    required_tasks = None

    def __init__(self) -> None:
        self._settings = Settings.from_env()
        self._service: Service | None = None

    def attach_router(self, app: Any) -> None:
        """Add the middleware. vLLM adds its own afterwards, so authentication runs before ours."""
        if self._settings is not None:
            app.add_middleware(HonesMiddleware, service=self.service)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:  # noqa: ARG002
        """Ask the workers about their model and load the profiles for it.

        Raises:
            HonesError: the engine cannot be steered, a profile does not fit, or the routing file is wrong.
        """
        settings = self._settings
        if settings is None:
            return
        log = logging.getLogger("hones_serving")
        if log.level == logging.NOTSET:  # a dependency of vLLM's sets the root logger to errors only
            log.setLevel(logging.WARNING)
        if engine_client is None:
            raise StateError("a render server has no engine to steer; start it without HONES_PROFILES")
        identities = await engine_client.collective_rpc("hones_identity")
        front = attach(engine_client, identities, settings, LISTING)
        front.metrics = metrics = Metrics(front.registry)
        registry, models = front.registry, state.openai_serving_models
        served = tuple(model.name for model in models.base_model_paths)
        self._service = Service(
            registry=registry,
            plan=load_plan(settings.routing, registry.tasks()) if settings.routing else RoutingPlan(),
            metrics=metrics,
            served=served,
            exact=lambda: {*served, *models.lora_requests},
            allow_updates=settings.allow_updates,
            playground=settings.playground,
            stamp=_stamp,
        )

    def service(self) -> Service:
        """What the middleware works with; there is none before the server has started."""
        if self._service is None:
            raise StateError("the server has not started yet")
        return self._service


def _stamp(body: dict[str, Any], admission: Admission) -> None:
    """Name the admission in a request's body, where vLLM hands it on to the engine's front."""
    body["vllm_xargs"] = {**(body.get("vllm_xargs") or {}), TICKET: admission.ticket}
