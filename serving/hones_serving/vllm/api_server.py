"""The HTTP side in vLLM's API server: puts the steering middleware inside vLLM's authentication."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from hones_serving.contract import Service
from hones_serving.metrics import Metrics
from hones_serving.middleware import HonesMiddleware
from hones_serving.registry import LISTING
from hones_serving.routing import RoutingPlan
from hones_serving.routing_file import load_plan
from hones_serving.settings import Settings
from hones_serving.shared_state import ROUTING
from hones_serving.vllm.front import attach
from hones_steer.errors import StateError


class Endpoint:
    """Plugin object for vLLM's API server, whose hooks vLLM calls; does nothing unless HONES_PROFILES is set."""

    name = "hones"
    required_tasks = None

    def __init__(self) -> None:
        self._settings = Settings.from_env()
        self._service: Service | None = None

    def attach_router(self, app: Any) -> None:
        """Add the middleware to vLLM's FastAPI application. vLLM adds its own later, so authentication runs first."""
        if self._settings is not None:
            app.add_middleware(HonesMiddleware, service=self.service)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:  # noqa: ARG002
        """Build the middleware's service for the engine, with the profiles of the folder.

        Raises:
            StateError: the engine cannot be steered.
            ProfileError, MismatchError: a profile is broken, or was made for another model.
            RoutingError: the routing file is wrong.
        """
        settings = self._settings
        if settings is None:
            return
        log = logging.getLogger("hones_serving")
        if log.level == logging.NOTSET:  # a dependency of vLLM's sets the root logger to errors only
            log.setLevel(logging.WARNING)
        if engine_client is None:
            raise StateError("a render server has no engine to steer; start it without HONES_PROFILES")
        self._service = await make_service(settings, engine_client, state.openai_serving_models)

    def service(self) -> Service:
        """The service that the middleware works with. Raises StateError if the server has not started yet."""
        if self._service is None:
            raise StateError("the server has not started yet; send the request again later")
        return self._service


async def make_service(settings: Settings, engine_client: Any, models: Any) -> Service:
    """Give an AsyncLLM its front, and build the service that decides on its requests; `models` is OpenAIServingModels.

    The workers of all replicas are asked about their model.

    Raises:
        StateError: the workers run different models.
        ProfileError, MismatchError: a profile is broken, or was made for another model.
        RoutingError: the routing file is wrong.
    """
    # `collective_rpc` of the client itself gives the answer of the first data-parallel replica only.
    replicas = await engine_client.engine_core.call_utility_all_async("collective_rpc", "hones_identity", None, ())
    identities = [identity for workers in replicas for identity in workers]
    front = attach(engine_client, identities, settings, LISTING)
    registry = front.registry
    several = engine_client.vllm_config.parallel_config._api_process_count > 1
    front.metrics = metrics = Metrics(registry, several=several)
    routing = settings.routing
    if routing is not None and several and settings.state is not None:
        routing = settings.state / ROUTING  # the one that all of them read
    served = tuple(model.name for model in models.base_model_paths)
    return Service(
        registry=registry,
        plan=load_plan(routing, registry.tasks()) if routing else RoutingPlan(),
        metrics=metrics,
        served=served,
        exact=lambda: {*served, *models.lora_requests},
        allow_updates=settings.allow_updates,
        playground=settings.playground,
        max_body=settings.max_body,
    )
