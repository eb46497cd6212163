"""The application: transformers' routes without those that load or drop models, ours around them, and the API key."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import transformers
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from transformers import AutoProcessor, GenerationMixin
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseGenerateManager, BaseHandler, GenerationState, Modality

from hones_serving import playground, signatures
from hones_serving.asgi import App, Message, Receive, Scope, Send, error_content, path_of, with_changed_answer
from hones_serving.contract import Service
from hones_serving.metrics import Metrics
from hones_serving.middleware import HonesMiddleware
from hones_serving.registry import ProfileRegistry
from hones_serving.routing import RoutingPlan
from hones_serving.routing_file import load_plan
from hones_serving.settings import Settings
from hones_serving.transformers_server.batching import generate_together
from hones_serving.transformers_server.command import KV_CACHE_GIB, MAX_NUM_SEQS
from hones_serving.transformers_server.continuous import cache_tokens, has_pages
from hones_serving.transformers_server.exactness import exact_pages, is_exact
from hones_serving.transformers_server.generation import Batches, OneGeneration, SteeredGeneration
from hones_serving.transformers_server.handlers import Chat, Completion, Responses
from hones_serving.transformers_server.stopping import StoppingMiddleware, unavailable
from hones_serving.transformers_server.turns import LOGGER, TURN, StoppingError, Turn, Turns
from hones_steer.errors import DataError, HonesError
from hones_steer.huggingface import Steering, steer
from hones_steer.loading import load_model, loading
from hones_steer.profile import ModelIdentity

TESTED = "5.19"
# The routes of transformers' server that stay. Others load, drop or list models of the client's choice, or answer
# unsteered.
_KEPT = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/health"}
_KEPT |= {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
_OPEN = {"/health", "/metrics", playground.PATH}  # routes that need no key


def build_app(
    settings: Settings,
    manager: ModelManager,
    served: Sequence[str],
    api_key: str | None = None,
    allowed_origins: Sequence[str] = (),
    collector: CollectorRegistry = REGISTRY,
    *,
    most: int = MAX_NUM_SEQS,
    cache_gib: float = KV_CACHE_GIB,
) -> FastAPI:
    """Steer the model that `manager` holds (see `pinned`) and build the application that serves it.

    `served` are the names of the model; `collector` gets the metrics; at most `most` requests generate at a time,
    from a paged cache of `cache_gib` GiB if the model can have one (0: none). The application's `state.turns` are the
    requests that wait or generate; `stopping.serve` drains them.

    Raises:
        LayoutError: the model cannot be steered.
        ProfileError, MismatchError: a profile is broken, or was made for another model.
        RoutingError: the routing file is wrong.
        StateError: this transformers version is not supported.
    """
    signatures.check(_overridden(), f"transformers {transformers.__version__}", TESTED)
    model = next(iter(manager.loaded_models.values())).model
    registry = ProfileRegistry(
        settings.profiles,
        ModelIdentity.from_model(model),
        max_profiles=settings.max_profiles or 1,
        always_enough=settings.max_profiles is None,  # a batch has no more profiles than there are slots
    )
    plan = load_plan(settings.routing, registry.tasks()) if settings.routing else RoutingPlan()
    metrics = Metrics(registry, collector)
    # The registry has checked the profiles against this model; each is loaded when a request that it steers runs.
    steering = steer(model, {}, max_profiles=most, allow_mismatch=True)
    batches = _batches(manager, steering, metrics, most, cache_gib)
    state = OneGeneration(SteeredGeneration(batches, steering))
    app = build_server(manager, generation_state=state, **_handlers(manager, state, served))
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _KEPT]
    _add_routes(app, served, collector)
    _add_error_handlers(app)
    service = Service(
        registry=registry,
        plan=plan,
        metrics=metrics,
        served=tuple(served),
        exact=lambda: served,
        allow_updates=settings.allow_updates,
        playground=settings.playground,
        max_body=settings.max_body,
    )
    app.state.turns = Turns()
    _add_middleware(app, service, api_key, allowed_origins)
    return app


def _handlers(manager: ModelManager, state: GenerationState, served: Sequence[str]) -> dict[str, Any]:
    handlers: dict[str, Any] = {
        "chat_handler": Chat(manager, state, served),
        "completion_handler": Completion(manager, state, served),
        "response_handler": Responses(manager, state, served),
    }
    for name in inspect.signature(build_server).parameters:
        if name.endswith("_handler"):
            handlers.setdefault(name, None)  # its route is left out
    return handlers


def _batches(manager: ModelManager, steering: Steering, metrics: Metrics, most: int, cache_gib: float) -> Batches:
    """Make the batches that the model answers exactly: with a paged cache or without, of one length or of several."""
    loaded = next(iter(manager.loaded_models.values()))
    model: Any = loaded.model
    processor: Any = loaded.processor
    padded = is_exact(model, processor, functools.partial(generate_together, model), "prompts padded to one length")
    text = manager.get_model_modality(model, processor) == Modality.LLM
    pages = None
    if cache_gib and text and has_pages(model):
        pages = exact_pages(model, processor, most, cache_tokens(model, most, cache_gib))
    LOGGER.info("At most %d requests generate at a time, %s", most, "in pages" if pages else "in batches")
    return Batches(model, steering, metrics, most=most, padded=padded, pages=pages)


def pinned(name: str, *, dtype: str = "auto", device: str = "auto") -> ModelManager:
    """Load a model with its processor into a transformers model manager that never unloads it.

    Raises:
        DataError: the model or the device does not exist, the model's checkpoint lacks weights, or transformers' server
            cannot run a model of this kind.
    """
    model = load_model(name, dtype=dtype, device=device)
    with loading(f"the processor of {name!r}"):
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    manager = ModelManager(device=device, dtype=dtype, model_timeout=-1)
    try:
        manager.get_model_modality(model, processor)  # type: ignore[arg-type]
    except ValueError as error:
        raise DataError(
            f"transformers' server cannot run {name!r}: {error}; name a model that generates text"
        ) from error
    manager.force_model = name
    key = manager.process_model_name(name)
    forget = functools.partial(manager.loaded_models.pop, key, None)
    manager.loaded_models[key] = TimedModel(model, -1, processor, forget)  # type: ignore[arg-type]
    return manager


def _overridden() -> Iterator[tuple[Callable[..., Any], tuple[str, ...]]]:
    """Yield (function of transformers' server that is overridden, names of the parameters it must begin with)."""
    streaming = ("self", "model", "processor", "inputs", "gen_config", "request_id", "response_parser")
    yield BaseGenerateManager.generate_streaming, streaming
    yield BaseGenerateManager.generate_non_streaming, streaming[:-1]
    yield GenerationMixin._sample, ("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config")
    yield GenerationState.get_manager, ("self", "model_id", "use_cb")
    yield BaseHandler.__init__, ("self", "model_manager", "generation_state")
    yield BaseHandler._validate_request, ("self", "body")
    yield BaseHandler._resolve_model, ("self", "body")
    yield BaseHandler._build_generation_config, ("self", "body", "model_generation_config")
    yield BaseHandler.get_processor_inputs_from_messages, ("messages", "modality")


def _add_routes(app: FastAPI, served: Sequence[str], collector: CollectorRegistry) -> None:
    started = int(time.time())

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        common = {"object": "model", "created": started, "owned_by": "hones-steer", "parent": None}
        return {"object": "list", "data": [{"id": name, **common} for name in served]}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(collector), media_type=CONTENT_TYPE_LATEST)


def _add_middleware(app: FastAPI, service: Service, api_key: str | None, allowed_origins: Sequence[str]) -> None:
    """Wrap the routes, innermost first: the middleware that is added last sees a request first."""
    turns: Turns = app.state.turns
    app.add_middleware(SecondsMiddleware)
    app.add_middleware(LeavingMiddleware, turns=turns)
    app.add_middleware(HonesMiddleware, service=lambda: service)
    app.add_middleware(StoppingMiddleware, turns=turns)
    if api_key:
        app.add_middleware(KeyMiddleware, key=api_key)
    if allowed_origins:  # outside the key, because browsers ask without one whether they may call
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Hones-Profile", "X-Hones-Route"],
        )


def _add_error_handlers(app: FastAPI) -> None:
    """Give errors the JSON that OpenAI's API and vLLM give them."""

    @app.exception_handler(HTTPException)
    def refused(_request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    def unreadable(_request: Request, _: RequestValidationError) -> Response:
        return _error(400, "the body is no JSON object, or its Content-Type is not application/json")

    @app.exception_handler(StoppingError)
    def stopping(_request: Request, error: StoppingError) -> Response:
        return unavailable(str(error))

    @app.exception_handler(HonesError)
    def failed(_request: Request, error: HonesError) -> Response:
        return _error(500, str(error))


def _error(status: int, message: str, **headers: str) -> Response:
    return JSONResponse(error_content(status, message), status, headers)


class KeyMiddleware:
    """Answers 401 to requests without ``Authorization: Bearer <key>``, but for /health, /metrics and /hones."""

    def __init__(self, app: App, key: str) -> None:
        self._app = app
        self._digest = _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; the lifespan passes through."""
        if scope["type"] == "lifespan" or scope["path"] in _OPEN or self._has_key(scope):
            await self._app(scope, receive, send)
        else:
            refused = _error(401, "the API key is missing or wrong", **{"WWW-Authenticate": "Bearer"})
            await refused(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        kind, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        return kind.lower() == b"bearer" and secrets.compare_digest(_digest(key), self._digest)


class SecondsMiddleware:
    """Gives the time of a response in whole seconds, as OpenAI and vLLM do: LiteLLM's proxy streams no others."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; anything but responses passes through."""
        if scope["type"] == "http" and path_of(scope) == "/v1/responses":
            send = with_changed_answer(send, _without_fraction, _without_fraction)
        await self._app(scope, receive, send)


def _without_fraction(answer: dict[str, Any]) -> bool:
    """Drop the fraction of a response's time, in itself or in an event of its stream; false if there is none."""
    response = answer.get("response", answer)
    if not isinstance(response.get("created_at"), float):
        return False
    response["created_at"] = int(response["created_at"])
    return True


class LeavingMiddleware:
    """Cancels the request of a client that has left, for whom transformers' server would go on generating."""

    def __init__(self, app: App, turns: Turns) -> None:
        self._app = app
        self._turns = turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        turn = Turn(self._turns)
        TURN.set(turn)  # for the handler, whose task is made below
        received: asyncio.Queue[Message] = asyncio.Queue()
        answered = False

        async def listen() -> None:
            message: Message = {}
            while message.get("type") != "http.disconnect":
                message = await receive()
                received.put_nowait(message)

        async def watched(message: Message) -> None:
            nonlocal answered
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        leaving = asyncio.create_task(listen())
        handling = asyncio.ensure_future(self._app(scope, received.get, watched))
        try:
            await asyncio.wait((leaving, handling), return_when=asyncio.FIRST_COMPLETED)
            if not answered:  # servers report the end of an answer as if the client had left
                turn.leave()
                handling.cancel()
            await asyncio.wait((handling,))
            if not handling.cancelled():
                handling.result()
        finally:
            leaving.cancel()
            handling.cancel()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # always of one length, so that comparing takes always the same time
