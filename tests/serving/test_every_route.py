"""Steering on every route that generates: what the official clients get, what bodies may be, what websockets may say.

The engine is a small ASGI application that answers each protocol as vLLM does, and says what the request it got was
admitted with.
"""

import asyncio
import contextlib
import contextvars
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import numpy as np
import openai
import pytest
from hones_serving.contract import Service
from hones_serving.exchange import current_admission, generating
from hones_serving.metrics import Metrics
from hones_serving.middleware import HonesMiddleware
from hones_serving.registry import ProfileRegistry
from hones_serving.routing import RoutingPlan
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from hones_steer import ModelIdentity, Profile, save_profile
from hones_steer.scopes import scoped_digest

pytestmark = pytest.mark.anyio

IDENTITY = ModelIdentity("", None, "llama", 2, 8, 32, (1.0,) * 16)
VQA = Profile("vqa", {0: (np.array([1], np.int32), np.array([2.0], np.float32))}, IDENTITY)
LIMIT = 20_000
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
ROUTES = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
COUNTING = ("/v1/messages/count_tokens", "/tokenize")
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
RESPONSE_USAGE = {
    "input_tokens": 1,
    "output_tokens": 2,
    "total_tokens": 3,
    "input_tokens_details": {"cached_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 0},
}
TOOL = {"name": "look", "description": "Look.", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def steered_by() -> str:
    admission = current_admission()
    if admission is None or admission.profile is None:
        return "nothing"
    return admission.profile.digest if admission.scope == "all" else f"{admission.profile.digest} {admission.scope}"


class Engine:
    """An engine that serves the model "m"; its texts say the profile's digest and the scope that the request got."""

    def __init__(self, folder: Path) -> None:
        self.collector = CollectorRegistry()
        registry = ProfileRegistry(folder, IDENTITY, max_profiles=2, always_enough=False)
        self.service = Service(
            registry=registry,
            plan=RoutingPlan(),
            metrics=Metrics(registry, self.collector),
            served=("m",),
            exact=lambda: {"m"},
            allow_updates=True,
            playground=False,
            max_body=LIMIT,
        )
        self.got: list[bytes] = []
        self.headers: list[Any] = []
        self.background: list[str] = []
        routes: list[Any] = [Route(path, self.answer, methods=["POST"]) for path in ROUTES]
        routes += [Route("/v1/other", self.other, methods=["POST"]), WebSocketRoute("/v1/realtime", self.talk)]
        routes += [Route(path, self.count, methods=["POST"]) for path in COUNTING]
        self.app = HonesMiddleware(Starlette(routes=routes), lambda: self.service)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://server")

    def counted(self, name: str, **labels: str) -> float | None:
        return self.collector.get_sample_value(name, labels)

    async def answer(self, request: Request) -> Response:
        self.got.append(await request.body())
        self.headers.append(request.headers)
        assert int(request.headers["content-length"]) == len(self.got[-1])
        body = json.loads(self.got[-1])
        assert body["model"] == "m"
        assert not {"hones_task", "hones_scope"} & body.keys()
        path = request.url.path
        if body.get("background"):

            async def later() -> None:
                self.background.append(steered_by())

            self.task = asyncio.create_task(later())
        if body.get("stream"):
            return StreamingResponse(self.stream(path, body), media_type="text/event-stream")
        text = await asyncio.create_task(self.text_of_a_task())
        return JSONResponse(whole(path, text))

    async def text_of_a_task(self) -> str:
        """Look in a thread that is given the context, as the front of vLLM does where vLLM uses threads."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(None, context.run, steered_by)

    async def stream(self, path: str, body: dict[str, Any]) -> Any:
        for event in events(path, steered_by(), bool((body.get("stream_options") or {}).get("include_usage"))):
            name = f"event: {event['type']}\n" if "type" in event else ""
            yield f"{name}data: {json.dumps(event)}\n\n"
        if path in (CHAT, COMPLETIONS):
            yield "data: [DONE]\n\n"

    async def other(self, request: Request) -> Response:
        await request.body()
        if request.query_params.get("quiet"):
            return JSONResponse({})
        generating()
        return JSONResponse({"steered_by": steered_by()}, background=BackgroundTask(lambda: None))

    async def count(self, request: Request) -> Response:
        self.got.append(await request.body())
        assert int(request.headers["content-length"]) == len(self.got[-1])
        return JSONResponse({"input_tokens": 1})

    async def talk(self, socket: WebSocket) -> None:
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                text = await socket.receive_text()
                generating()
                await socket.send_text(f"{steered_by()}: {text}")


def whole(path: str, text: str) -> dict[str, Any]:
    if path == RESPONSES:
        part = {"type": "output_text", "text": text, "annotations": []}
        message = {"type": "message", "id": "1", "role": "assistant", "status": "completed", "content": [part]}
        common = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "status": "completed"}
        answer = {"id": "1", "object": "response", "created_at": 0, "model": "m", "output": [message]}
        return {**answer, **common, "usage": RESPONSE_USAGE}
    if path == MESSAGES:
        content = [{"type": "text", "text": text}, {"type": "tool_use", "id": "t", "name": "look", "input": {}}]
        usage = {"input_tokens": 1, "output_tokens": 2}
        answer = {"id": "1", "type": "message", "role": "assistant", "model": "m", "content": content}
        return {**answer, "stop_reason": "tool_use", "usage": usage}
    said = {"message": {"role": "assistant", "content": text}} if path == CHAT else {"text": text}
    choice = {"index": 0, "finish_reason": "stop", **said}
    kind = "chat.completion" if path == CHAT else "text_completion"
    return {"id": "1", "object": kind, "created": 0, "model": "m", "choices": [choice], "usage": USAGE}


def events(path: str, text: str, totals: bool) -> list[dict[str, Any]]:
    if path == RESPONSES:
        done = whole(path, text)
        begun = {**done, "status": "in_progress", "output": [], "usage": None}
        kinds = [("response.created", begun), ("response.in_progress", begun), ("response.completed", done)]
        return [{"type": kind, "sequence_number": i, "response": answer} for i, (kind, answer) in enumerate(kinds)]
    if path == MESSAGES:
        start = {**whole(path, text), "content": [], "stop_reason": None}
        return [
            {"type": "message_start", "message": start},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
            {"type": "message_stop"},
        ]

    def chunk(choices: list[dict[str, Any]], usage: Any = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if path == CHAT else "text_completion"
        return {"id": "1", "object": kind, "created": 0, "model": "m", "choices": choices, "usage": usage}

    said = {"delta": {"content": text}} if path == CHAT else {"text": text}
    ended = {"delta": {}} if path == CHAT else {"text": ""}
    chunks = [
        chunk([{"index": 0, "finish_reason": None, **said}]),
        chunk([{"index": 0, "finish_reason": "stop", **ended}]),
    ]
    return [*chunks, chunk([], USAGE)] if totals else chunks


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    save_profile(VQA, tmp_path / "vqa.safetensors")
    return Engine(tmp_path)


def ask(path: str, **body: Any) -> dict[str, Any]:
    return {"model": "m", **BODIES[path], **body}


CONFIRMED = {"profile": "vqa", "digest": VQA.digest, "route": "alias"}


# The official clients


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_openais_client_on_responses(engine: Engine, stream: bool) -> None:
    tool: Any = {"type": "function", "name": "look", "parameters": TOOL["input_schema"], "strict": False}
    async with (
        engine.client() as http,
        openai.AsyncOpenAI(base_url="http://server/v1", api_key="x", http_client=http) as ai,
    ):
        if stream:
            async with ai.responses.stream(model="m:vqa", input="hi", tools=[tool]) as events:
                names = {event.response.model async for event in events if hasattr(event, "response")}
                answer = await events.get_final_response()
            assert names == {"m:vqa"}
        else:
            answer = await ai.responses.create(model="m:vqa", input="hi", tools=[tool])
    assert (answer.output_text, answer.model) == (VQA.digest, "m:vqa")
    assert answer.model_extra is not None
    assert answer.model_extra["hones"] == CONFIRMED


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_anthropics_client_on_messages(engine: Engine, stream: bool) -> None:
    options: Any = {"model": "m:vqa", "max_tokens": 4, "messages": BODIES[MESSAGES]["messages"], "tools": [TOOL]}
    async with (
        httpx2.AsyncClient(transport=httpx2.ASGITransport(engine.app), base_url="http://server") as http,
        anthropic.AsyncAnthropic(base_url="http://server", api_key="x", http_client=http, max_retries=0) as ai,
    ):
        if stream:
            async with ai.messages.stream(**options) as events:
                answer: Any = await events.get_final_message()
        else:
            answer = await ai.messages.create(**options)
            assert answer.content[1].name == "look"
        with pytest.raises(anthropic.NotFoundError, match="known tasks: vqa") as unknown:
            await ai.messages.create(**{**options, "model": "m:nope", "stream": stream})
    assert (answer.content[0].text, answer.model) == (VQA.digest, "m:vqa")
    assert answer.model_extra["hones"] == CONFIRMED
    assert unknown.value.body["type"] == "error"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("totals", [False, True], ids=["without usage", "with usage"])
async def test_openais_client_on_streams_of_completions(engine: Engine, path: str, totals: bool) -> None:
    async with (
        engine.client() as http,
        openai.AsyncOpenAI(base_url="http://server/v1", api_key="x", http_client=http) as ai,
    ):
        completions: Any = ai.chat.completions if path == CHAT else ai.completions
        options = {"stream_options": {"include_usage": True}} if totals else {}
        stream = await completions.create(**ask(path, model="m:vqa"), stream=True, **options)
        chunks = [chunk async for chunk in stream]
    confirmed = [chunk.model_extra.get("hones") for chunk in chunks]
    assert confirmed == [None] * (len(chunks) - 1) + [CONFIRMED]
    assert (chunks[-1].usage is not None) == totals


# A gateway


class Gateway:
    """A gateway that hands on what OpenAI's API names, and no X- header either way, as LiteLLM's and others do."""

    known = frozenset({"model", "messages", "prompt", "input", "max_tokens", "stream", "stream_options"})

    def __init__(self, upstream: httpx.AsyncClient) -> None:
        self.upstream = upstream
        self.app = Starlette(routes=[Route("/{path:path}", self.forward, methods=["POST"])])

    async def forward(self, request: Request) -> Response:
        body = {name: value for name, value in json.loads(await request.body()).items() if name in self.known}
        answer = await self.upstream.post(request.url.path, json=body)
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_behind_a_gateway_the_alias_names_and_the_body_confirms(engine: Engine, stream: bool) -> None:
    async with engine.client() as upstream:
        gateway = httpx.ASGITransport(Gateway(upstream).app)
        async with (
            httpx.AsyncClient(transport=gateway) as http,
            openai.AsyncOpenAI(base_url="http://gateway/v1", api_key="x", http_client=http) as ai,
        ):
            lost: Any = {"extra_body": {"hones_task": "none"}, "extra_headers": {"X-Hones-Task": "none"}}
            raw = await ai.chat.completions.with_raw_response.create(
                model="m:vqa", messages=[{"role": "user", "content": "hi"}], stream=stream, **lost
            )
            answer: Any = raw.parse()
            last = [chunk async for chunk in answer][-1] if stream else answer
    assert not [name for name in raw.headers if name.startswith("x-hones")]
    assert (last.model, last.model_extra["hones"]) == ("m:vqa", CONFIRMED)


# Where the confirmation is


@pytest.mark.parametrize("path", ROUTES)
async def test_an_answer_confirms_in_its_json_what_was_asked_for_or_applied(engine: Engine, path: str) -> None:
    async with engine.client() as client:

        async def hones(headers: dict[str, str] | None = None, **body: Any) -> Any:
            response = await client.post(path, json=ask(path, **body), headers=headers)
            assert response.status_code == 200, response.text
            answer = response.json()
            assert (response.headers["x-hones-profile"] == "none") == (VQA.digest not in json.dumps(answer))
            return answer.get("hones")

        assert await hones() is None
        assert await hones(hones_task="vqa") == {**CONFIRMED, "route": "body"}
        assert await hones(model="m:vqa+vqa@0.0") == {**CONFIRMED, "profile": "vqa+vqa@0.0"}
        assert await hones({"X-Hones-Task": "none"}) == {"profile": "none", "digest": None, "route": "header"}
        engine.service.plan = RoutingPlan(default="vqa")
        assert await hones() == {**CONFIRMED, "route": "default"}
        engine.service.registry.enabled = False
        assert await hones() is None
        assert await hones(model="m:vqa") == {"profile": "none", "digest": None, "route": "off"}
    assert engine.service.registry.in_flight() == engine.service.registry.slots_used() == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ROUTES)
async def test_a_scope_reaches_the_engine_and_is_confirmed(engine: Engine, path: str, stream: bool) -> None:
    async with engine.client() as client:

        async def answer(**body: Any) -> tuple[str, Any]:
            """The text of an answer, with its header, and the object ``hones`` in it."""
            response = await client.post(path, json=ask(path, stream=stream, **body))
            assert response.status_code == 200, response.text
            (confirmed,) = re.findall(r'"hones": *({[^}]*})', response.text)
            return response.text + response.headers["x-hones-profile"], json.loads(confirmed)

        for scope in ("prompt", "generated"):
            digest = scoped_digest(VQA.digest, scope)
            text, confirmed = await answer(model="m:vqa", hones_scope=scope)
            assert confirmed == {**CONFIRMED, "digest": digest, "scope": scope}
            assert f"{VQA.digest} {scope}" in text
            assert f"vqa ({digest[:12]}; {scope})" in text
        assert (await answer(model="m:vqa", hones_scope="all"))[1] == CONFIRMED
        engine.service.registry.enabled = False
        assert (await answer(hones_scope="prompt"))[1] == {"profile": "none", "digest": None, "route": "off"}


async def test_an_answer_to_who_neither_asks_nor_gets_is_the_engines_byte_for_byte(engine: Engine) -> None:
    data = b'{ "model":"m", "input": "hi",\n "n": 1.0}'
    async with engine.client() as client:
        response = await client.post(RESPONSES, content=data)
    assert engine.got == [data]
    assert response.content == JSONResponse(whole(RESPONSES, "nothing")).body


async def test_a_response_in_the_background_is_steered_as_it_was_admitted(engine: Engine) -> None:
    async with engine.client() as client:
        body = ask(RESPONSES, hones_task="vqa", hones_scope="generated", background=True)
        await client.post(RESPONSES, json=body)
        await engine.task
        await client.post(RESPONSES, json=ask(RESPONSES, background=True))
        await engine.task
    assert engine.background == [f"{VQA.digest} generated", "nothing"]


# Routes that cannot be steered


async def test_a_default_that_does_not_reach_a_route_is_counted(engine: Engine) -> None:
    async def count(**query: str) -> tuple[float | None, float | None]:
        async with engine.client() as client:
            response = await client.post("/v1/other", json={}, params=query)
            assert response.status_code == 200
        unreached = engine.counted("hones_unreached_defaults_total", profile="vqa")
        return unreached, engine.counted("hones_requests_total", profile="none", route="path")

    assert await count() == (None, 1)
    engine.service.plan = RoutingPlan(default="vqa@0.5")
    assert await count() == (1, 2)
    assert await count(quiet="1") == (1, 2)
    engine.service.registry.enabled = False
    assert await count() == (1, 3)


def test_a_websocket_that_names_steering_is_refused(engine: Engine) -> None:
    client = TestClient(engine.app)
    for url, headers in (
        ("/v1/realtime", {"X-Hones-Task": "vqa"}),
        ("/v1/realtime?model=m:vqa", {}),
        ("/v1/realtime?hones_task=none", {}),
        ("/v1/realtime?hones_scope=prompt", {}),
    ):
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(url, headers=headers):
            pass
        assert refused.value.status_code == 400
        assert "websockets cannot be steered; leave out" in refused.value.json()["error"]["message"]
    assert engine.counted("hones_requests_total", profile="none", route="path") is None


@pytest.mark.parametrize(
    "message",
    [{"hones_task": "vqa"}, {"type": "session.update", "model": "m:vqa"}, {"session": {"model": "m:vqa"}}],
    ids=str,
)
def test_a_websocket_closes_on_a_message_that_names_steering(engine: Engine, message: dict[str, Any]) -> None:
    engine.service.plan = RoutingPlan(default="vqa")
    with TestClient(engine.app).websocket_connect("/v1/realtime?model=m") as socket:
        socket.send_text('{"model": "m"}')
        assert socket.receive_text() == 'nothing: {"model": "m"}'
        socket.send_text(json.dumps(message))
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
    assert closed.value.code == 1008
    assert "cannot be steered" in closed.value.reason
    assert engine.counted("hones_requests_total", profile="none", route="path") == 1
    assert engine.counted("hones_unreached_defaults_total", profile="vqa") == 1


# Routes that only count tokens


@pytest.mark.parametrize("path", COUNTING)
async def test_tokens_are_counted_for_a_model_by_its_alias(engine: Engine, path: str) -> None:
    async with engine.client() as client:
        for model in ("m:vqa@0.5", "m"):
            response = await client.post(path, json={"model": model, "prompt": "hi"})
            assert (response.status_code, response.json()) == (200, {"input_tokens": 1})
            assert "x-hones-profile" not in response.headers  # nothing was generated
            assert json.loads(engine.got.pop()) == {"model": "m", "prompt": "hi"}
        refused = [
            ({"model": "m:nope"}, 404, "known tasks: vqa"),
            ({"model": "m:vqa@"}, 400, "vqa@"),
            ({"model": "m:vqa", "hones_task": "vqa"}, 400, "leave out 'hones_task'"),
        ]
        for body, status, words in refused:
            response = await client.post(path, json=body)
            assert response.status_code == status
            assert words in response.json()["error"]["message"]
            assert (response.json().get("type") == "error") == (path == COUNTING[0])
        data = b'{"model": "m:vqa", "model": "m"}'
        response = await client.post(path, content=data, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
    assert not engine.got


# Bodies


@pytest.mark.parametrize("path", [*ROUTES, "/v1/other", "/v1/hones/profiles"])
@pytest.mark.parametrize("how", ["declared", "chunked", "gzip", "audio"])
async def test_a_body_beyond_the_limit_is_413(engine: Engine, path: str, how: str) -> None:
    body = json.dumps({"model": "m", "x": "y" * LIMIT}).encode()

    async def chunks() -> Any:
        for start in range(0, len(body), 999):
            yield body[start : start + 999]

    kind = {"audio": "audio/wav"}.get(how, "application/json")
    headers = {"Content-Type": kind, **({"Content-Encoding": "gzip"} if how == "gzip" else {})}
    content: Any = {"declared": body, "gzip": gzip.compress(body)}.get(how) or chunks()
    async with engine.client() as client:
        response = await client.post(path, content=content, headers=headers)
    assert response.status_code == 413, response.text
    assert "--max-body-mb" in response.json()["error"]["message"]
    assert not engine.got


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("spare", [0, 1], ids=["as large as may be", "a byte less"])
async def test_a_body_within_the_limit_arrives_decompressed(engine: Engine, path: str, spare: int) -> None:
    body = json.dumps(ask(path, x="")).encode()
    body = json.dumps(ask(path, x="y" * (LIMIT - len(body) - spare))).encode()
    assert len(body) == LIMIT - spare
    half = len(body) // 2
    async with engine.client() as client:
        for data in (gzip.compress(body), gzip.compress(body[:half]) + gzip.compress(body[half:])):
            response = await client.post(
                path, content=data, headers={"Content-Encoding": "gzip", "X-Hones-Task": "vqa"}
            )
            assert response.status_code == 200, response.text
            assert VQA.digest in response.text
    assert engine.got == [body, body]
    assert not any("content-encoding" in headers for headers in engine.headers)


@pytest.mark.parametrize(
    ("encoding", "data", "status"),
    [
        ("deflate", zlib.compress(b"{}"), 415),
        ("gzip, gzip", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), 415),
        ("br", b"x", 415),
        ("gzip", b"{}", 400),
        ("gzip", gzip.compress(b"{}" * 99, mtime=0)[:-9], 400),
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/other"])
async def test_what_cannot_be_decompressed_is_refused(
    engine: Engine, path: str, encoding: str, data: bytes, status: int
) -> None:
    async with engine.client() as client:
        response = await client.post(path, content=data, headers={"Content-Encoding": encoding})
    assert response.status_code == status, response.text
    assert not engine.got


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ('"model": "m", "hones_task": "vqa", "hones_task": "none"', "hones_task"),
        ('"model": "m", "hones_task": null, "hones_\\u0074ask": null', "hones_task"),
        ('"model": "m:vqa", "hones_scope": "prompt", "hones_scope": "all"', "hones_scope"),
        ('"model": "m:vqa", "model": "m"', "model"),
        ('"model": "m", "vllm_xargs": {"hones_task": "vqa"}, "vllm_xargs": {}', "vllm_xargs"),
        ('"model": "m", "vllm_xargs": {"hones_task": "vqa", "hones_task": "vqa"}', "hones_task"),
    ],
)
@pytest.mark.parametrize("path", [*ROUTES, "/v1/other"])
async def test_a_name_of_steering_given_twice_is_400(engine: Engine, path: str, body: str, name: str) -> None:
    async with engine.client() as client:
        response = await client.post(path, content=f"{{{body}}}", headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert f"the body gives '{name}' more than once" in response.json()["error"]["message"]
    assert not engine.got


async def test_other_names_may_be_given_twice_as_for_the_engine(engine: Engine) -> None:
    data = b'{"model": "m", "prompt": "a", "prompt": "b", "x": {"model": 1, "model": 2}}'
    async with engine.client() as client:
        response = await client.post(COMPLETIONS, content=data)
    assert response.status_code == 200
    assert engine.got == [data]
