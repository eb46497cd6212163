"""The HTTP contract of steering, over a real server, with real clients.

The engine is a small application that says what it got: the body, and the profile that the request was admitted with.
"""

import asyncio
import contextlib
import gzip
import hashlib
import json
import queue
import socket
import threading
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from hones_serving.contract import Service
from hones_serving.exchange import current_admission, generating
from hones_serving.expert_room import ExpertRoom
from hones_serving.metrics import Metrics
from hones_serving.middleware import HonesMiddleware
from hones_serving.registry import LISTING, ProfileRegistry
from hones_serving.routing import RoutingPlan
from hones_serving.routing_file import load_plan
from hones_serving.shared_registry import SharedRegistry, write_first_state
from hones_serving.shared_state import SharedState, State, Stored, write_state
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from hones_steer import ModelIdentity, Profile, save_profile
from hones_steer.ffns import FfnRun
from hones_steer.profile import serialize_profile

IDENTITY = ModelIdentity("", None, "llama", 2, 8, 32, (1.0,) * 16)
TIMEOUT = 300
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
STEERED_ROUTES = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


def profile(task, scale, identity=IDENTITY):
    return Profile(task, {0: (np.array([1], np.int32), np.array([scale], np.float32))}, identity, description=task)


VQA, OCR = profile("vqa", 2.0), profile("ocr", 3.0)


class Engine:
    """An engine that serves the model "m" and the LoRA adapter "m:lora".

    A request can ask it to wait (`gate`), to fail (`explode`), to `refuse` with a status, or to send a stream's bytes
    a few at a time (`pieces`).
    """

    def __init__(self):
        self.service = None
        self.calls = threading.Condition()
        self.forget()
        routes = [Route(path, self.complete, methods=["POST"]) for path in (CHAT, COMPLETIONS)]
        routes += [Route(path, self.echo, methods=["POST"]) for path in ("/v1/embeddings", "/tokenize")]
        routes += [Route("/v1/other", self.other, methods=["POST"])]
        routes += [Route("/v1/models", self.models), Route("/health", self.models)]
        self.app = self.noticed(HonesMiddleware(Starlette(routes=routes, lifespan=self.lifespan), lambda: self.service))

    def forget(self):
        self.started = self.ended = 0
        self.bodies, self.waiting = queue.Queue(), queue.Queue()

    def noticed(self, app):
        async def call(scope, receive, send):
            if scope["type"] == "lifespan":
                return await app(scope, receive, send)
            self.count(started=1)
            try:
                return await app(scope, receive, send)
            finally:
                self.count(ended=1)

        return call

    def count(self, started=0, ended=0):
        with self.calls:
            self.started += started
            self.ended += ended
            self.calls.notify_all()

    def settle(self, calls=0):
        """Wait until the middleware has finished `calls` requests or more, and all that it has begun."""
        with self.calls:
            assert self.calls.wait_for(lambda: self.started == self.ended >= calls, TIMEOUT)

    @contextlib.asynccontextmanager
    async def lifespan(self, _):
        self.loop, self.gate = asyncio.get_running_loop(), asyncio.Event()
        yield

    def open_gate(self):
        self.loop.call_soon_threadsafe(self.gate.set)

    async def pause(self, asked):
        if asked:
            self.waiting.put(True)
            await self.gate.wait()

    async def complete(self, request):
        data = await request.body()
        self.bodies.put(data)
        length = request.headers.get("content-length")
        assert length is None or int(length) == len(data)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            return JSONResponse({"error": {"message": "the engine cannot read this"}}, 400)
        if not isinstance(body, dict):
            return JSONResponse({"error": {"message": "the engine wants an object"}}, 400)
        if body.get("model", "m") not in ("m", "m:lora"):
            return JSONResponse({"error": {"message": "the engine knows no such model"}}, 404)
        if body.get("refuse"):
            return JSONResponse({"error": {"message": "the engine refuses"}}, body["refuse"])
        if body.get("explode"):
            raise OSError("the engine failed")
        if body.get("quiet"):
            return JSONResponse({})
        if body.get("stream"):
            return StreamingResponse(self.stream(body), media_type="text/event-stream")
        await self.pause(body.get("gate"))
        return JSONResponse(self.completion("chat.completion", "message", body))

    async def stream(self, body):
        for part in ("first", "last"):
            chunk = self.completion("chat.completion.chunk", "delta", {**body, "part": part})
            event = f"data: {json.dumps(chunk)}\n\n".encode()
            size = body.get("pieces", len(event))
            for start in range(0, len(event), size):
                yield event[start : start + size]
            if part == "first":
                await self.pause(body.get("gate"))
        yield "data: [DONE]\n\n"

    def completion(self, kind, field, body):
        admission = current_admission()
        steered_by = admission.profile.digest if admission and admission.profile else None
        scope = admission.scope if admission else None
        said = {"role": "assistant", "content": json.dumps({"got": body, "steered_by": steered_by, "scope": scope})}
        choice = {"index": 0, field: said, "finish_reason": "stop"}
        return {"id": "1", "object": kind, "created": 0, "model": body.get("model"), "choices": [choice]}

    async def echo(self, request):
        data = await request.body()
        return JSONResponse({"length": len(data), "got": data.decode("latin-1")})

    async def other(self, request):
        """A route that cannot be steered, and generates as `how` says: not at all, before, in or after its answer."""
        how = json.loads(await request.body())["how"]
        if how == "refused":
            generating()
            return JSONResponse({}, 400)
        if how == "stream":
            return StreamingResponse(self.generated(), media_type="text/event-stream")
        if how == "whole":
            await asyncio.gather(*(asyncio.to_thread(generating) for _ in range(3)))
        return JSONResponse({}, background=BackgroundTask(generating) if how == "later" else None)

    async def generated(self):
        generating()
        yield "data: {}\n\n"

    async def models(self, _):
        common = {"object": "model", "created": 0, "owned_by": "me", "root": "/m"}
        return JSONResponse({"object": "list", "data": [{"id": "m", **common}, {"id": "m:lora", **common}]})


@contextlib.contextmanager
def serving(app, **options):
    """Start a real server and yield its address; connections wait in its socket until it is up."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", timeout_keep_alive=600, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(TIMEOUT)
        listener.close()


def browsing(address):
    return httpx.Client(base_url=address, timeout=TIMEOUT, verify=False)  # no TLS here; setting it up takes a while


@pytest.fixture(scope="module")
def running():
    engine = Engine()
    with serving(engine.app) as engine.address, browsing(engine.address) as engine.client:
        yield engine


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "profiles"
    folder.mkdir()
    for each in (VQA, OCR):
        save_profile(each, folder / f"{each.task}.safetensors")
    return folder


@pytest.fixture
def engine(running, folder):
    """The engine with two profiles, room for two, no routing file, and updates allowed."""
    engine = running
    engine.forget()
    engine.collector = CollectorRegistry()
    registry = ProfileRegistry(folder, IDENTITY, max_profiles=2, always_enough=False)
    engine.service = Service(
        registry=registry,
        plan=RoutingPlan(),
        metrics=Metrics(registry, engine.collector),
        served=("m",),
        exact=lambda: {"m", "m:lora"},
        allow_updates=True,
        playground=True,
        max_body=2**20,
    )
    yield engine
    engine.settle()
    engine.loop.call_soon_threadsafe(engine.gate.clear)
    assert engine.service.registry.slots_used() == 0


@pytest.fixture
def client(engine):
    return engine.client


@pytest.fixture
def ai(engine):
    return openai.OpenAI(base_url=engine.address + "/v1", api_key="x", max_retries=0, http_client=engine.client)


def ask(client, path=CHAT, headers=None, **body):
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return client.post(path, json={"model": "m", **prompt, **body}, headers=headers)


def said(response):
    assert response.status_code == 200, response.text
    return json.loads(response.json()["choices"][0]["message"]["content"])


def steering(response):
    return response.headers["x-hones-profile"], response.headers["x-hones-route"]


def refused(response, status, *texts):
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, status)
    assert error.keys() == {"message", "type", "param", "code"}
    for text in texts:
        assert text in error["message"]
    assert response.headers["x-hones-profile"] == "none"
    return error


def shown(each, asked=None):
    return f"{asked or each.task} ({each.short_digest})"


def counts(engine):
    """All samples of hones_requests_total: (profile, route) -> number of requests."""
    (family,) = [family for family in engine.collector.collect() if family.name == "hones_requests"]
    return {
        (sample.labels["profile"], sample.labels["route"]): sample.value
        for sample in family.samples
        if sample.name == "hones_requests_total"
    }


def counted(engine, name, **labels):
    return engine.collector.get_sample_value(name, labels)


# Who decides


@STEERED_ROUTES
def test_the_body_names_the_task(client, engine, path):
    response = ask(client, path, hones_task="vqa", temperature=0.5)
    assert said(response)["steered_by"] == VQA.digest
    assert "hones_task" not in said(response)["got"]
    assert said(response)["got"]["temperature"] == 0.5
    assert steering(response) == (shown(VQA), "body")
    engine.settle()
    assert counted(engine, "hones_requests_total", profile="vqa", route="body") == 1


def test_the_task_can_stand_in_vllm_xargs(client):
    response = ask(client, vllm_xargs={"hones_task": "vqa", "mine": 1})
    assert said(response)["got"]["vllm_xargs"] == {"mine": 1}
    assert said(response)["steered_by"] == VQA.digest
    assert steering(response) == (shown(VQA), "body")


def test_vllm_xargs_that_held_nothing_else_are_taken_out(client):
    """Engines other than vLLM know no such field."""
    assert "vllm_xargs" not in said(ask(client, vllm_xargs={"hones_task": "none"}))["got"]
    assert said(ask(client, vllm_xargs={"hones_task": "none", "mine": 1}))["got"]["vllm_xargs"] == {"mine": 1}
    assert said(ask(client, hones_task="none", vllm_xargs={"mine": 1}))["got"]["vllm_xargs"] == {"mine": 1}


def test_the_header_names_the_task(client, engine):
    response = ask(client, headers={"X-Hones-Task": "vqa@0.5+ocr"})
    blend = VQA * 0.5 + OCR
    assert said(response)["steered_by"] == blend.digest
    assert steering(response) == (shown(blend, "vqa@0.5+ocr"), "header")
    engine.settle()
    assert counted(engine, "hones_requests_total", profile="blend", route="header") == 1


@pytest.mark.parametrize("alias", ["vqa", "ocr+vqa", "vqa@-1", "none"])
def test_the_model_names_the_task(ai, alias):
    raw = ai.chat.completions.with_raw_response.create(model=f"m:{alias}", messages=[{"role": "user", "content": "hi"}])
    assert raw.parse().model == f"m:{alias}"
    assert raw.headers["content-length"] == str(len(raw.content))
    assert raw.headers["x-hones-route"] == "alias"
    assert raw.headers["x-hones-profile"].startswith("none" if alias == "none" else f"{alias} (")


def test_body_beats_header_beats_alias(client):
    everything = {"hones_task": "vqa", "model": "m:none"}
    assert steering(ask(client, headers={"X-Hones-Task": "ocr"}, **everything)) == (shown(VQA), "body")
    del everything["hones_task"]
    response = ask(client, headers={"X-Hones-Task": "ocr"}, **everything)
    assert steering(response) == (shown(OCR), "header")
    assert said(response)["got"]["model"] == "m"
    assert steering(ask(client, hones_task=None, **everything)) == ("none", "alias")


def test_the_routing_file_decides_for_those_who_do_not_ask(client, engine, tmp_path):
    (tmp_path / "r.yaml").write_text("default: vqa\nrules:\n- {task: ocr, prompt_regex: read}\n")
    engine.service.plan = load_plan(tmp_path / "r.yaml", engine.service.registry.tasks())
    assert steering(ask(client)) == (shown(VQA), "default")
    assert steering(ask(client, messages=[{"role": "user", "content": "read this"}])) == (shown(OCR), "rule")
    assert steering(ask(client, COMPLETIONS, prompt="read this")) == (shown(OCR), "rule")
    assert steering(ask(client, hones_task="none")) == ("none", "body")


def test_a_lora_whose_name_looks_like_an_alias_is_itself(client):
    response = ask(client, model="m:lora")
    assert said(response)["got"]["model"] == "m:lora"
    assert steering(response) == ("none", "default")


def test_without_steering_every_byte_passes_as_it_is(client, engine):
    data = b'{ "model":"m", "messages": [],\n "n": 1.0, "x": "\\u00e4\xc3\xa4", "vllm_xargs": {"k": 1} }'
    response = client.post(CHAT, content=data, headers={"content-type": "application/json"})
    assert steering(response) == ("none", "default")
    assert engine.bodies.get_nowait() == data
    engine.settle()
    assert counted(engine, "hones_requests_total", profile="none", route="default") == 1


def test_what_a_steered_body_says_survives(client):
    text = 'ä€😀"\\\n\u2028' + "\ud83d" + "x" * 200_000
    data = json.dumps({"model": "m", "hones_task": "vqa", "messages": [{"content": text}], "big": 2**70, "f": 1e-7})
    got = said(client.post(CHAT, content=data))["got"]
    assert got["messages"][0]["content"] == text
    assert (got["big"], got["f"]) == (2**70, 1e-7)


def test_a_chunked_body_is_read_to_its_end(client):
    data = json.dumps({"model": "m", "hones_task": "vqa", "messages": [], "pad": "x" * 100_000}).encode()
    response = client.post(CHAT, content=iter([data[:10], data[10:50_000], data[50_000:]]))
    assert said(response)["steered_by"] == VQA.digest
    assert len(said(response)["got"]["pad"]) == 100_000


def test_steering_that_adds_up_to_nothing_is_none(client, engine):
    response = ask(client, hones_task="vqa+vqa@-1")
    assert steering(response) == ("none", "body")
    assert said(response)["steered_by"] is None
    engine.settle()
    assert counted(engine, "hones_requests_total", profile="none", route="body") == 1


# Scope


@STEERED_ROUTES
@pytest.mark.parametrize("place", ["body", "vllm_xargs", "both"])
@pytest.mark.parametrize("scope", ["prompt", "generated"])
def test_a_scope_goes_with_the_admission_and_enters_the_digest(client, path, place, scope):
    named = {"hones_scope": scope}
    more = {"body": named, "vllm_xargs": {"vllm_xargs": named}, "both": {**named, "vllm_xargs": named}}[place]
    response = ask(client, path, hones_task="vqa", **more)
    assert (said(response)["steered_by"], said(response)["scope"]) == (VQA.digest, scope)
    assert not {"hones_scope", "hones_task", "vllm_xargs"} & said(response)["got"].keys()
    digest = hashlib.sha256(f"{VQA.digest}:{scope}".encode()).hexdigest()
    assert steering(response) == (f"vqa ({digest[:12]}; {scope})", "body")


def test_all_is_the_scope_of_those_who_name_none(client):
    for named in ({}, {"hones_scope": "all"}, {"hones_scope": None}):
        response = ask(client, hones_task="vqa", **named)
        assert said(response)["scope"] == "all"
        assert steering(response) == (shown(VQA), "body")


def test_a_scope_is_of_whatever_steers(client, engine, tmp_path):
    (tmp_path / "r.yaml").write_text("default: vqa\nrules:\n- {task: none, prompt_regex: plainly}\n")
    engine.service.plan = load_plan(tmp_path / "r.yaml", engine.service.registry.tasks())
    assert said(ask(client, hones_scope="prompt"))["scope"] == "prompt"
    assert said(ask(client, model="m:ocr", hones_scope="prompt"))["scope"] == "prompt"
    assert said(ask(client, headers={"X-Hones-Task": "ocr"}, hones_scope="generated"))["scope"] == "generated"
    plainly = [{"role": "user", "content": "plainly"}]
    for response in (
        ask(client, hones_task="none", hones_scope="prompt"),
        ask(client, messages=plainly, hones_scope="prompt"),
    ):
        assert said(response)["got"].keys() == {"model", "messages"}
        assert response.headers["x-hones-profile"] == "none"
    engine.service.registry.enabled = False
    assert steering(ask(client, hones_task="vqa", hones_scope="prompt")) == ("none", "off")


@pytest.mark.parametrize("value", ["answer", "", 1, ["prompt"], {}, "x" * 100], ids=repr)
def test_an_unknown_scope_is_refused(client, engine, value):
    for named in ({"hones_scope": value}, {"vllm_xargs": {"hones_scope": value}}):
        error = refused(ask(client, hones_task="vqa", **named), 400, "; give 'all', 'prompt' or 'generated'")
        assert error["param"] == "hones_scope"
    engine.service.registry.enabled = False
    refused(ask(client, hones_task="vqa", hones_scope=value), 400, "the scope is")


def test_two_scopes_and_a_scope_of_nothing_are_refused(client):
    both = {"hones_scope": "prompt", "vllm_xargs": {"hones_scope": "all"}}
    refused(ask(client, hones_task="vqa", **both), 400, "hones_scope is 'prompt' and in vllm_xargs 'all'; give it once")
    error = refused(ask(client, hones_scope="prompt"), 400, "nothing steers this request; name 'hones_task'")
    assert error["param"] == "hones_scope"
    assert steering(ask(client, hones_scope="all")) == ("none", "default")
    response = client.post("/v1/embeddings", json={"model": "m", "input": "hi", "hones_scope": "prompt"})
    refused(response, 400, "leave out 'hones_scope'")
    assert client.post("/v1/embeddings", json={"model": "m", "input": "hi", "hones_scope": None}).status_code == 200


# Streaming


def test_a_stream_is_steered_and_arrives_as_it_is_made(client, engine):
    body = {"model": "m", "messages": [], "stream": True, "gate": True, "hones_task": "vqa"}
    with client.stream("POST", CHAT, json=body) as response:
        assert steering(response) == (shown(VQA), "body")
        lines = response.iter_lines()
        assert "first" in next(lines)  # while the engine waits with the rest
        assert engine.service.registry.slots_used() == 1
        engine.open_gate()
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    engine.settle()
    assert engine.service.registry.slots_used() == 0


def test_the_openai_client_streams(ai):
    stream = ai.chat.completions.create(
        model="m:vqa", messages=[{"role": "user", "content": "hi"}], stream=True, extra_body={"hones_task": "ocr"}
    )
    chunks = [json.loads(chunk.choices[0].delta.content) for chunk in stream]
    assert [chunk["steered_by"] for chunk in chunks] == [OCR.digest] * 2


@STEERED_ROUTES
@pytest.mark.parametrize("pieces", [1, 7, 100_000])
def test_every_event_of_a_stream_names_the_model_as_asked_and_none_waits_for_the_next(client, engine, path, pieces):
    body = {"model": "m:vqa", "messages": [], "prompt": "", "stream": True, "gate": True, "pieces": pieces, "x": "ä\n"}
    with client.stream("POST", path, json=body) as response:
        assert steering(response) == (shown(VQA), "alias")
        lines = response.iter_lines()
        first = next(lines)
        engine.open_gate()
        events = [line.removeprefix("data: ") for line in [first, *lines] if line]
    assert events.pop() == "[DONE]"
    assert [json.loads(event)["model"] for event in events] == ["m:vqa"] * 2
    got = [json.loads(json.loads(event)["choices"][0]["delta"]["content"])["got"] for event in events]
    assert [(each["model"], each["part"], each["x"]) for each in got] == [("m", "first", "ä\n"), ("m", "last", "ä\n")]


@pytest.mark.parametrize("stream", [False, True])
def test_an_alias_that_did_not_decide_is_not_claimed(client, engine, stream):
    """The model's name is all that says what steered an answer, behind a proxy that drops headers."""
    for way in ({"hones_task": "ocr"}, {"headers": {"X-Hones-Task": "none"}}):
        assert '"model":"m"' in ask(client, model="m:vqa", stream=stream, **way).text.replace(" ", "")
    engine.service.registry.enabled = False
    assert '"m:vqa"' not in ask(client, model="m:vqa", stream=stream).text


def test_a_client_that_leaves_midway_gives_its_slot_back(client, engine):
    body = {"model": "m", "messages": [], "stream": True, "gate": True, "hones_task": "vqa"}
    with client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        assert "first" in next(lines)
        assert engine.service.registry.slots_used() == 1
    engine.settle()
    assert engine.service.registry.slots_used() == 0


def test_a_client_that_leaves_before_its_body_is_whole_reaches_no_engine(engine):
    host, port = engine.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    engine.settle(calls=1)
    assert engine.bodies.empty()


def test_an_engine_that_fails_gives_the_slot_back(client, engine):
    response = ask(client, hones_task="vqa", explode=True)
    assert response.status_code == 500
    engine.settle()
    assert engine.service.registry.slots_used() == 0


# Refusals


@STEERED_ROUTES
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 404, 415, 422, 503])
def test_what_the_engine_refuses_is_not_steered_and_not_counted(client, engine, path, stream, status):
    for asked, route in (({"hones_task": "vqa"}, "body"), ({"model": "m:vqa"}, "alias"), ({}, "default")):
        response = ask(client, path, refuse=status, stream=stream, **asked)
        assert response.status_code == status
        assert response.json() == {"error": {"message": "the engine refuses"}}
        assert steering(response) == ("none", route)
    engine.settle()
    assert not counts(engine)
    assert steering(ask(client, path, hones_task="vqa")) == (shown(VQA), "body")
    assert counts(engine) == {("vqa", "body"): 1}


def test_a_stream_counts_once_it_begins_and_any_other_answer_once_it_is_there(client, engine):
    with client.stream("POST", CHAT, json={"model": "m:vqa", "stream": True, "gate": True}) as response:
        assert response.status_code == 200
        assert counts(engine) == {("vqa", "alias"): 1}
        assert counted(engine, "hones_requests_in_flight") == 1
        with concurrent(client, hones_task="ocr", gate=True) as held:
            engine.waiting.get(timeout=TIMEOUT), engine.waiting.get(timeout=TIMEOUT)
            assert counts(engine) == {("vqa", "alias"): 1}
            assert counted(engine, "hones_requests_in_flight") == 2
            engine.open_gate()
            assert held().status_code == 200
    engine.settle()
    assert counts(engine) == {("vqa", "alias"): 1, ("ocr", "body"): 1}
    assert counted(engine, "hones_requests_in_flight") == 0


@STEERED_ROUTES
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_task_is_400_and_lists_the_known(client, engine, path, stream):
    response = ask(client, path, hones_task="nope", stream=stream)
    error = refused(response, 400, "no profile for the task 'nope'; known tasks: ocr, vqa")
    assert (error["type"], error["param"]) == ("BadRequestError", "hones_task")
    assert response.headers["x-hones-route"] == "body"
    refused(ask(client, path, headers={"X-Hones-Task": "nope"}, stream=stream), 400, "'nope'")
    assert engine.bodies.empty()
    assert "nope" not in str(list(engine.collector.collect()))


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_alias_is_404(client, engine, stream):
    error = refused(ask(client, model="m:nope", stream=stream), 404, "'m:nope' does not exist", "known tasks: ocr, vqa")
    assert (error["type"], error["param"]) == ("NotFoundError", "model")
    response = ask(client, model="m:nope", stream=stream, hones_task="vqa")  # whoever decides
    refused(response, 404)
    assert response.headers["x-hones-route"] == "alias"
    assert engine.bodies.empty()


def test_the_openai_client_raises_its_own_errors(ai):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(model="m:nope", messages=messages)
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model="m", messages=messages, stream=True, extra_body={"hones_task": "nope"})
    assert caught.value.param == "hones_task"


def test_an_unknown_model_is_the_engines_business(client):
    response = ask(client, model="other:vqa")
    assert response.status_code == 404
    assert "the engine knows no such model" in response.text
    assert steering(response) == ("none", "default")


@pytest.mark.parametrize(
    "asked",
    [
        {"hones_task": "vqa ocr"},
        {"hones_task": ""},
        {"hones_task": 1},
        {"hones_task": ["vqa"]},
        {"hones_task": "vqa@11"},
        {"hones_task": "vqa", "vllm_xargs": {"hones_task": "ocr"}},
        {"hones_task": "x" * 1000},
        {"model": "m:"},
        {"model": "m:v q a"},
        {"headers": {"X-Hones-Task": "vqa,ocr"}},
        {"headers": {"X-Hones-Task": ""}},
        {"headers": {"X-Hones-Task": "vqä".encode("latin-1")}},
        {"headers": [("X-Hones-Task", "vqa"), ("X-Hones-Task", "ocr")]},
        {"headers": [("X-Hones-Task", "vqa"), ("X-Hones-Task", "")]},
    ],
    ids=str,
)
def test_what_is_malformed_is_400(client, engine, asked):
    refused(ask(client, **asked), 400)
    assert engine.bodies.empty()


@pytest.mark.parametrize(
    "values", [["vqa", "vqa"], ["vqa", " vqa\t"], ["  vqa "], ["vqa, vqa"], ["vqa,vqa", "vqa"]], ids=str
)
def test_a_header_given_twice_with_the_same_value_is_given(engine, values):
    """Proxies repeat headers, join repeated ones, and leave spaces; uvicorn takes some of these away, others do not."""
    headers = [(b"x-hones-task", value.encode()) for value in values]
    started, body = [], json.dumps({"model": "m"}).encode()

    async def answer(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        started.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    asyncio.run(HonesMiddleware(answer, lambda: engine.service)(scope, receive, send))
    assert dict(started[0]["headers"])[b"x-hones-profile"].decode() == shown(VQA)


def test_different_values_of_a_header_are_told_apart(client):
    response = ask(client, headers=[("X-Hones-Task", "vqa"), ("X-Hones-Task", "ocr"), ("X-Hones-Task", "vqa")])
    refused(response, 400, "X-Hones-Task is 'vqa' and 'ocr'; give it once, or the same twice")


@pytest.mark.parametrize("key", ["hones_digest", "hones_tsk"])
def test_names_of_ours_are_not_for_clients(client, key):
    refused(ask(client, vllm_xargs={key: "x"}), 400, f"'{key}' is a reserved name")
    refused(ask(client, **{key: "x"}), 400, f"'{key}' is a reserved name")
    refused(client.post("/v1/embeddings", json={"vllm_xargs": {key: "x"}}), 400, f"leave out '{key}'")


def test_xargs_that_are_no_object_are_400(client):
    refused(ask(client, vllm_xargs="x", hones_task="vqa"), 400, "vllm_xargs")
    assert said(ask(client, vllm_xargs=None, hones_task="vqa"))["steered_by"] == VQA.digest


@pytest.mark.parametrize("beams", [True, 1, "true"])
def test_beams_cannot_be_steered(client, beams):
    refused(ask(client, hones_task="vqa", use_beam_search=beams), 400, "beam search cannot be steered")
    assert ask(client, use_beam_search=beams).status_code == 200
    assert ask(client, hones_task="none", use_beam_search=beams).status_code == 200
    assert ask(client, hones_task="vqa", use_beam_search=False).status_code == 200


def test_beyond_the_slots_is_429(client, engine):
    engine.service.registry.hold("one")
    with concurrent(client, hones_task="vqa", gate=True) as held:
        engine.waiting.get(timeout=TIMEOUT)
        error = refused(ask(client, hones_task="ocr"), 429, "2 other profiles are in use")
        assert error["type"] == "TooManyRequestsError"
        refused(ask(client, hones_task="ocr", stream=True), 429)
        assert ask(client, hones_task="vqa").status_code == 200  # shares the slot
        assert ask(client).status_code == 200
        engine.open_gate()
        assert said(held())["steered_by"] == VQA.digest
    engine.settle()
    assert ask(client, hones_task="ocr").status_code == 200
    engine.settle()
    engine.service.registry.release("one")
    assert counted(engine, "hones_requests_total", profile="ocr", route="body") == 1


@contextlib.contextmanager
def concurrent(client, **body):
    """Ask in another thread, and yield a function that waits for the response."""
    responses = queue.Queue()
    thread = threading.Thread(target=lambda: responses.put(ask(client, **body)))
    thread.start()
    try:
        yield lambda: responses.get(timeout=TIMEOUT)
    finally:
        thread.join(TIMEOUT)


ZIPPED = gzip.compress(b'{"hones_task": "vqa"}', mtime=0)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"vqa"', b"null", b"\xff", b"[" * 9999, ZIPPED])
def test_what_is_no_json_object_goes_to_the_engine_as_it_is(client, engine, data):
    response = client.post(CHAT, content=data, headers={"content-type": "application/json"})
    assert "the engine" in response.text
    assert steering(response) == ("none", "off")
    assert engine.bodies.get_nowait() == data
    refused(client.post(CHAT, content=data, headers={"X-Hones-Task": "vqa"}), 400, "no JSON object")


def test_whatever_json_can_be_read_can_be_written_again(client):
    def status(depth):
        data = '{"model": "m", "quiet": true, "hones_task": "vqa", "x": ' + "[" * depth + "]" * depth + "}"
        return client.post(CHAT, content=data).status_code

    assert {status(depth) for depth in range(900, 1000)} == {200, 400}  # 400: the engine could not read it


# Elsewhere


@pytest.mark.parametrize(
    "body",
    [
        {"hones_task": "vqa"},
        {"hones_task": "none"},
        {"hones_task": 1},
        {"vllm_xargs": {"hones_task": "vqa"}},
        {"model": "m:vqa"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"])
def test_steering_on_another_route_is_400(client, body, kind):
    response = client.post("/v1/embeddings", content=json.dumps(body), headers={"content-type": kind})
    refused(response, 400, "/v1/completions, /v1/responses and /v1/messages can be steered")
    assert response.headers["x-hones-route"] == "path"


def test_a_large_upload_is_refused_before_it_is_read(client):
    headers = {"X-Hones-Task": "vqa", "content-type": "audio/wav"}
    refused(client.post("/tokenize", content=b"x" * 20_000_000, headers=headers), 400)


def test_the_header_on_another_route_is_400(client):
    for content in (b"x", b"{}"):
        response = client.post("/tokenize", content=content, headers={"X-Hones-Task": "vqa"})
        refused(response, 400, "leave out X-Hones-Task")
    assert client.get("/health", headers={"X-Hones-Task": "vqa"}).status_code == 200


@pytest.mark.parametrize(
    "data", [b'{ "model": "m", "hones_task": null }', b'{"model": "m:lora"}', b'{"model": "x:y"}', b"{", b"[]", b"\xff"]
)
def test_other_routes_get_every_byte(client, data):
    response = client.post("/v1/embeddings", content=data, headers={"content-type": "application/json"})
    assert response.json()["got"].encode("latin-1") == data
    assert "x-hones-profile" not in response.headers


def test_what_is_not_json_is_not_looked_at(client):
    upload = iter([b'{"hones_task": ', b'"vqa"}'])
    response = client.post("/v1/embeddings", content=upload, headers={"content-type": "application/octet-stream"})
    assert response.json()["got"] == '{"hones_task": "vqa"}'
    response = client.post("/tokenize", files={"file": b"audio"}, data={"hones_task": "vqa"})
    assert response.status_code == 200


def test_other_methods_and_kinds_of_connection_pass(client):
    assert client.get(CHAT).status_code == 405
    assert client.get("/nothing").status_code == 404
    calls = []

    async def app(*arguments):
        calls.append(arguments)

    async def nothing():
        raise AssertionError

    scope = {"type": "lifespan"}
    asyncio.run(HonesMiddleware(app, nothing)(scope, nothing, nothing))
    assert calls == [(scope, nothing, nothing)]


def test_it_works_under_a_root_path(engine):
    mounted = Engine()
    mounted.service = engine.service
    with serving(mounted.app, root_path="/api") as address, browsing(address) as client:
        assert steering(ask(client, CHAT, hones_task="vqa")) == (shown(VQA), "body")
        assert len(client.get("/v1/hones/profiles").json()["data"]) == 2
        assert [model["id"] for model in client.get("/v1/models").json()["data"]][2:] == ["m:ocr", "m:vqa"]
        refused(client.post("/v1/embeddings", json={"hones_task": "vqa"}), 400)
        mounted.settle()


@pytest.mark.parametrize("default", ["none", "vqa"])
@pytest.mark.parametrize("how", ["whole", "stream", "later"])
def test_what_generates_by_another_route_is_counted_as_unsteered(client, engine, tmp_path, how, default):
    (tmp_path / "r.yaml").write_text(f"default: {default}\n")
    engine.service.plan = load_plan(tmp_path / "r.yaml", engine.service.registry.tasks())
    response = client.post("/v1/other", json={"how": how})
    assert response.status_code == 200
    if how == "later":  # too late for a header
        assert "x-hones-profile" not in response.headers
    else:
        assert steering(response) == ("none", "path")
    engine.settle()
    assert counts(engine) == {("none", "path"): 1}


@pytest.mark.parametrize("how", ["refused", "not at all"])
def test_what_generates_nothing_is_not(client, engine, how):
    assert "x-hones-profile" not in client.post("/v1/other", json={"how": how}).headers
    engine.settle()
    assert not counts(engine)


def test_a_session_that_generates_is_counted_once(engine):
    async def app(*_):
        generating()
        generating()

    asyncio.run(HonesMiddleware(app, lambda: engine.service)({"type": "websocket", "path": "/v1/realtime"}, None, None))
    assert counts(engine) == {("none", "path"): 1}


def test_what_is_steered_is_never_counted_as_unsteered(engine):
    """Covers a request in the context of an unsteered one: uvicorn runs pipelined requests like that."""
    scope = {"type": "http", "method": "POST", "path": "/v1/other", "headers": []}
    counted = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/v1/other":
            await asyncio.create_task(steered({**scope, "path": CHAT}, receive, send))
            counted.append(counts(engine))
        else:
            generating()
        await send({"type": "http.response.body"})

    async def receive():
        return {"type": "http.request", "body": b'{"model": "m:vqa"}'}

    async def send(_):
        pass

    steered = HonesMiddleware(app, lambda: engine.service)
    asyncio.run(steered(scope, receive, send))
    assert counted == [{("vqa", "alias"): 1}] == [counts(engine)]


# Names of models that read like aliases


def test_a_name_that_reads_like_an_alias_is_reported_when_it_becomes_one(client, engine, folder, caplog):
    registry = ProfileRegistry(folder, IDENTITY, max_profiles=2, always_enough=False)
    names = {"m", "m:vqa", "m:vqa@0.5+ocr", "m:lora", "m:none", "m:a b", "other:vqa"}
    engine.service = replace(engine.service, registry=registry, served=("m", "m:none"), exact=lambda: names)
    reported = {"m:vqa", "m:vqa@0.5+ocr", "m:none"}
    assert reports(caplog) == reported
    response = client.post("/v1/hones/profiles", json={"name": "lora", "path": "vqa.safetensors"})
    assert response.status_code == 200
    assert reports(caplog) == {"m:lora"}
    names.add("m:ocr")  # as vLLM does when it is told to load an adapter
    client.post("/v1/other", json={"how": "not at all"})
    assert reports(caplog) == {"m:ocr"}
    names.add("m:ocr@2")  # as vLLM's resolvers do, while nobody looks
    ask(client, model="m:ocr@2")
    assert reports(caplog) == {"m:ocr@2"}
    ask(client, model="m:ocr@2")
    client.post("/v1/other", json={"how": "not at all"})
    assert reports(caplog) == set()


def reports(caplog):
    """The names that were logged since the last call."""
    names = {record.args[0] for record in caplog.records if record.name == "hones_serving.contract"}
    assert all(repr(name) in record.getMessage() for record in caplog.records for name in record.args[:1])
    caplog.clear()
    return names


# The list of models


def test_the_list_of_models_has_an_alias_for_each_task(ai, engine):
    models = {model.id: model for model in ai.models.list()}
    assert list(models) == ["m", "m:lora", "m:ocr", "m:vqa"]
    assert models["m:vqa"].parent == "m"
    assert models["m:vqa"].root == models["m"].root
    assert engine.service.registry.slots_used() == 0


def test_every_served_name_has_its_aliases_unless_taken(client, engine):
    engine.service.served = ("m", "not-listed")
    engine.service.registry.load("lora", "vqa.safetensors")
    ids = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert ids == ["m", "m:lora", "m:ocr", "m:vqa"]
    assert client.head("/v1/models").headers["content-length"] == str(len(client.get("/v1/models").content))
    engine.service.registry.unload("vqa")
    assert "m:vqa" not in client.get("/v1/models").text


# Administration


def test_the_profiles_are_listed(client, engine):
    engine.service.allow_updates = False
    listed = client.get("/v1/hones/profiles").json()
    assert listed["enabled"] is True
    assert [entry["name"] for entry in listed["data"]] == ["ocr", "vqa"]
    assert listed["data"][1]["digest"] == VQA.digest


def test_without_permission_nothing_changes(client, engine):
    engine.service.allow_updates = False
    changes = [
        ("POST", "/v1/hones/profiles", {"name": "new", "path": "vqa.safetensors"}),
        ("POST", "/v1/hones/profiles", {}),
        ("DELETE", "/v1/hones/profiles/vqa", {}),
        ("POST", "/v1/hones/steering", {"enabled": False}),
    ]
    for method, path, body in changes:
        error = refused(client.request(method, path, json=body), 403, "--allow-profile-updates")
        assert error["type"] == "ForbiddenError"
    assert engine.service.registry.tasks() == ["ocr", "vqa"]
    assert engine.service.registry.enabled


def test_a_profile_is_loaded_replaced_and_forgotten(client, engine, folder):
    second = profile("vqa", 5.0)
    save_profile(second, folder / "second.safetensors")
    for name in ("new", "vqa"):
        response = client.post("/v1/hones/profiles", json={"name": name, "path": "second.safetensors"})
        assert response.status_code == 200
        assert response.json() == {
            "name": name,
            "digest": second.digest,
            "neurons": 1,
            "layers": 1,
            "description": "vqa",
            "file": "second.safetensors",
        }
        assert steering(ask(client, hones_task=name)) == (shown(second, name), "body")
    assert client.delete("/v1/hones/profiles/vqa").json() == {"name": "vqa", "deleted": True}
    refused(ask(client, hones_task="vqa"), 400, "known tasks: new, ocr")
    refused(client.delete("/v1/hones/profiles/vqa"), 404, "no profile 'vqa'")
    assert counted(engine, "hones_profile_loads_total", result="ok") == 2
    assert counted(engine, "hones_profiles_loaded") == 2


def test_a_file_that_cannot_be_used_is_400_and_the_server_goes_on(client, engine, folder):
    save_profile(VQA, folder.parent / "outside.safetensors")
    (folder / "link").symlink_to(folder.parent / "outside.safetensors")
    (folder / "broken").write_bytes(b"junk")
    save_profile(profile("vqa", 1.0, ModelIdentity("", None, "llama", 9, 8, 32, None)), folder / "foreign")
    bad = {
        "../outside.safetensors": "leaves the folder",
        str(folder.parent / "outside.safetensors"): "leaves the folder",
        "link": "leaves the folder",
        "broken": "not a safetensors file",
        "foreign": "num_layers is 9",
        "missing": "cannot be read",
        "nul\0": "is not a path",
        "half\ud800": "is not a path",
    }
    for path, text in bad.items():
        data = json.dumps({"name": "vqa", "path": path})
        refused(client.post("/v1/hones/profiles", content=data), 400, text)
    assert counted(engine, "hones_profile_loads_total", result="error") == len(bad)
    assert steering(ask(client, hones_task="vqa")) == (shown(VQA), "body")


@pytest.mark.parametrize(
    "body", [{}, {"name": "a"}, {"name": "a", "path": 1}, {"name": "a", "path": "b", "c": 1}, [], 1]
)
def test_a_load_that_is_malformed_says_how_it_goes(client, body):
    refused(client.post("/v1/hones/profiles", json=body), 400, 'send {"name"')
    refused(client.post("/v1/hones/profiles", content=b"{"), 400, 'send {"name"')


def test_what_the_routing_file_needs_is_not_forgotten(client, engine, tmp_path):
    (tmp_path / "r.yaml").write_text("default: vqa\ncanary: {task: vqa, to: ocr@0.5, percent: 0}\n")
    engine.service.plan = load_plan(tmp_path / "r.yaml", engine.service.registry.tasks())
    for name in ("vqa", "ocr"):
        refused(client.delete(f"/v1/hones/profiles/{name}"), 400, f"the routing file steers with '{name}'")


def test_a_profile_of_more_experts_than_there_is_room_for_is_409(client, engine, tmp_path):
    mixture = replace(IDENTITY, intermediate_size=None, ffns=(FfnRun(0, 2, experts=8, expert_width=4),))

    def save(name, expert):
        layers = {(0, expert): (np.array([1], np.int32), np.array([2.0], np.float32))}
        save_profile(Profile(name, layers, mixture), tmp_path / f"{name}.safetensors")

    save("one", 1)
    room = ExpertRoom(1, frozenset(range(8)), frozenset({0, 1}))
    engine.service.registry = ProfileRegistry(tmp_path, mixture, max_profiles=2, always_enough=False, rooms=[room])
    save("more", 2)
    response = client.post("/v1/hones/profiles", json={"name": "more", "path": "more.safetensors"})
    refused(response, 409, "start the server with --max-expert-tables 2 or more")
    assert [entry["name"] for entry in client.get("/v1/hones/profiles").json()["data"]] == ["one"]
    assert counted(engine, "hones_profile_loads_total", result="error") == 1


@pytest.fixture
def shared(engine, folder):
    """The folder of the state that the engine's registry shares with another, which never confirms anything."""
    state = folder.parent / "state"
    state.mkdir(mode=0o700)
    write_first_state(state, {"vqa": VQA, "ocr": OCR})
    room = {"max_profiles": 2, "always_enough": False, "listing": LISTING}
    registry = SharedRegistry(SharedState(state, 0, 2, seconds=0), folder, IDENTITY, **room)
    engine.collector = CollectorRegistry()
    engine.service.registry, engine.service.metrics = registry, Metrics(registry, engine.collector, several=True)
    return state


def test_one_of_several_servers_says_which_it_is(client, shared):
    listed = client.get("/v1/hones/profiles").json()
    assert {name: listed[name] for name in ("api_server", "version", "enabled")} == {
        "api_server": 0,
        "version": 1,
        "enabled": True,
    }
    assert [entry["name"] for entry in listed["data"]] == ["ocr", "vqa"]
    assert shared.is_dir()


def test_what_another_server_has_changed_holds_on_every_route(client, engine, shared):
    def change(version, enabled, *names):
        write_state(shared, State(version, enabled, {name: Stored("f", serialize_profile(VQA)) for name in names}))

    change(2, True, "new")
    assert steering(ask(client, hones_task="new")) == (f"new ({VQA.short_digest})", "body")
    change(3, True, "newer")
    counting = client.post("/tokenize", json={"model": "m:newer", "prompt": "hi"})
    assert json.loads(counting.json()["got"])["model"] == "m"
    change(4, True, "newest")
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["m", "m:lora", "m:newest"]
    change(5, False)
    refused(ask(client, hones_task="newest"), 400, "no profile for the task 'newest'")
    assert steering(ask(client)) == ("none", "off")
    assert counted(engine, "hones_profiles_loaded") == 0


def test_a_change_that_not_all_have_confirmed_is_503_and_holds(client, engine, shared, folder):
    second = profile("vqa", 5.0)
    save_profile(second, folder / "vqa.safetensors")
    load = client.post("/v1/hones/profiles", json={"name": "vqa", "path": "vqa.safetensors"})
    refused(load, 503, "the change is made (version 2)", "API server 1 has not started")
    assert counted(engine, "hones_profile_loads_total", result="ok") == 1
    assert steering(ask(client, hones_task="vqa")) == (shown(second), "body")
    refused(client.delete("/v1/hones/profiles/ocr"), 503, "the change is made (version 3)")
    refused(ask(client, hones_task="ocr"), 400, "no profile for the task 'ocr'")
    refused(client.post("/v1/hones/steering", json={"enabled": False}), 503, "the change is made (version 4)")
    assert steering(ask(client, hones_task="vqa")) == ("none", "off")
    assert shared.is_dir()


def test_without_the_state_nothing_is_steered(client, engine, shared, tmp_path):
    (tmp_path / "r.yaml").write_text("default: vqa\nrules:\n- {task: none, prompt_regex: plainly}\n")
    engine.service.plan = load_plan(tmp_path / "r.yaml", engine.service.registry.tasks())
    (shared / "state").rename(shared / "away")
    for asked, route in (
        ({"hones_task": "vqa"}, "body"),
        ({"hones_task": "unheard-of"}, "body"),
        ({"headers": {"X-Hones-Task": "ocr@0"}}, "header"),
        ({"model": "m:vqa"}, "alias"),
        ({"model": "m:unheard-of"}, "alias"),
        ({"stream": True}, "default"),
    ):
        response = ask(client, **asked)
        refused(response, 503, "this API server does not know what steers now, so it steers nothing", "No such file")
        assert response.headers["x-hones-route"] == route
    refused(ask(client, hones_task="v q a"), 400)
    refused(client.post("/tokenize", json={"model": "m:vqa", "prompt": "hi"}), 503)
    refused(client.get("/v1/hones/profiles"), 503)
    refused(client.delete("/v1/hones/profiles/vqa"), 400)  # which the routing file names
    refused(client.post("/v1/hones/profiles", json={"name": "new", "path": "vqa.safetensors"}), 503)
    assert counted(engine, "hones_profile_loads_total", result="error") == 1
    refused(client.post("/v1/hones/steering", json={"enabled": False}), 503)
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["m", "m:lora"]
    plainly = [{"role": "user", "content": "plainly"}]
    for response in (ask(client, hones_task="none"), ask(client, model="m:none"), ask(client, messages=plainly)):
        assert said(response)["steered_by"] is None
    (shared / "away").rename(shared / "state")
    assert steering(ask(client)) == (shown(VQA), "default")


@pytest.mark.parametrize("name", ["", "..%2F..%2Fvqa", "vqa/", "%00"])
def test_a_name_of_nothing_cannot_be_forgotten(client, name):
    refused(client.delete(f"/v1/hones/profiles/{name}"), 404)


def test_other_methods_are_405(client):
    for method, path in (
        ("PUT", "/v1/hones/profiles"),
        ("GET", "/v1/hones/steering"),
        ("POST", "/v1/hones/profiles/vqa"),
    ):
        assert refused(client.request(method, path), 405)["type"] == "MethodNotAllowedError"


def test_a_replacement_does_not_touch_who_is_inside(client, engine, folder):
    second = profile("vqa", 5.0)
    save_profile(second, folder / "vqa.safetensors")
    with concurrent(client, hones_task="vqa", gate=True) as held:
        engine.waiting.get(timeout=TIMEOUT)
        client.post("/v1/hones/profiles", json={"name": "vqa", "path": "vqa.safetensors"})
        assert steering(ask(client, hones_task="vqa")) == (shown(second), "body")
        client.delete("/v1/hones/profiles/vqa")
        client.post("/v1/hones/steering", json={"enabled": False})
        engine.open_gate()
        response = held()
        assert said(response)["steered_by"] == VQA.digest
        assert steering(response) == (shown(VQA), "body")


def test_the_kill_switch(client, engine, tmp_path):
    (tmp_path / "r.yaml").write_text("default: vqa\n")
    engine.service.plan = load_plan(tmp_path / "r.yaml", engine.service.registry.tasks())
    assert client.post("/v1/hones/steering", json={"enabled": False}).json() == {"enabled": False}
    assert client.get("/v1/hones/profiles").json()["enabled"] is False
    for asked in ({}, {"hones_task": "vqa"}, {"headers": {"X-Hones-Task": "vqa"}}, {"model": "m:vqa"}):
        response = ask(client, **asked)
        assert steering(response) == ("none", "off")
        assert said(response)["steered_by"] is None
        assert said(response)["got"]["model"] == "m"
        assert "hones_task" not in said(response)["got"]
    refused(ask(client, hones_task="nope"), 400, "known tasks: ocr, vqa")
    refused(ask(client, headers={"X-Hones-Task": "nope"}), 400)
    refused(ask(client, hones_task="v q a"), 400)
    refused(ask(client, model="m:nope"), 404)
    assert counted(engine, "hones_requests_total", profile="none", route="off") == 4
    assert client.post("/v1/hones/steering", json={"enabled": True}).json() == {"enabled": True}
    assert steering(ask(client)) == (shown(VQA), "default")


@pytest.mark.parametrize("body", [{}, {"enabled": 0}, {"enabled": "no"}, {"enabled": True, "x": 1}, [], None])
def test_the_kill_switch_takes_true_and_false(client, engine, body):
    refused(client.post("/v1/hones/steering", json=body), 400, '{"enabled": true}')
    assert engine.service.registry.enabled
