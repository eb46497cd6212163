"""Steering over HTTP: real servers of both engines, called as users call them.

Expected texts are those of transformers, steered with the same profiles. Where it matters what is in flight when
something changes, generation is stopped meanwhile. `-k transformers` runs one engine's.
"""

import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import torch
from serving.checkpoints import llama as make_llama
from serving.engines import free_port, server
from serving.http_helpers import NEW_TOKENS, Answer, Client, Question, Samples, ask, increase, scrape, until
from serving.sites import (
    ENGINES,
    PICTURES,
    TAKEN,
    TEXTS,
    Form,
    Site,
    Transformers,
    Vllm,
    api_server,
    confirmation,
    plain_env,
)
from serving.steered import Reference, write_profiles
from tiny_models import random_profile
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from hones_steer import save_profile
from hones_steer.store import parse_expression

pytestmark = pytest.mark.anyio

KEY = "s3cret"
ORIGIN = "https://app.example"  # whose pages may call the servers
LONG = 250  # tokens: seconds
SLICE = 0.1  # seconds
ROUTING = """\
default: vqa@0.5
rules:
  - task: ocr
    header: {X-Tenant: documents}
  - task: none
    header: {X-Tenant: plain}
  - task: cap@2
    header: {X-Tenant: trial}
canary: {task: cap@2, to: ocr@1.5, percent: 50}
"""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


# One API server before two engines. What is other with them than with one: test_replicas.py.
REPLICAS = pytest.param("replicas", marks=pytest.mark.matrix)


@pytest.fixture(scope="module", params=[*ENGINES, REPLICAS])
def engine(request: pytest.FixtureRequest) -> Vllm | Transformers:
    return Vllm(replicas=2) if request.param == "replicas" else ENGINES[request.param]


only_vllm = pytest.mark.parametrize("engine", ["vllm"], indirect=True)
only_transformers = pytest.mark.parametrize("engine", ["transformers"], indirect=True)


@pytest.fixture(scope="module")
async def site(
    engine: Vllm | Transformers, embedded: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    """The embedded VLM, served by `hones serve` with a key, a routing file, and permission to change profiles."""
    here = tmp_path_factory.mktemp("site")
    model = AutoModelForImageTextToText.from_pretrained(embedded, dtype=torch.float32)
    folder, routing = here / "profiles", here / "routing.yaml"
    # A trained model keeps its answers under a few scales.
    profiles = write_profiles(model, folder, fraction=0.9)
    routing.write_text(ROUTING)
    processor = AutoProcessor.from_pretrained(embedded)
    reference = Reference(model, folder, processor)
    profiles["new"] = random_profile(model, 99, "vqa", 0.9)
    (folder / "next").mkdir()
    save_profile(profiles["new"], folder / "next" / "vqa.safetensors")
    reference.steering.load("new", folder / "next" / "vqa.safetensors")
    command, env = engine.serve(
        embedded,
        here,
        *("--profiles", str(folder), "--routing", str(routing), "--api-key", KEY),
        *("--allow-profile-updates", "--playground", "--allowed-origins", json.dumps([ORIGIN])),
        *("--served-model-name", "tiny", "--dtype", "float32"),
        # Transformers' server takes tools as it is.
        *(("--enable-auto-tool-choice", "--tool-call-parser", "pythonic") if isinstance(engine, Vllm) else ()),
    )
    with server(command, here / "log", env) as running:
        site = Site(engine, running, folder, profiles, reference, processor, KEY)
        # vLLM 0.32 may answer 500 ("P0/P1 cache drift") to requests that bring one new image at the same time.
        async with site.client() as client:
            for question in PICTURES:
                await ask(client, question, count=1)
        yield site
        assert running.process.poll() is None


@pytest.fixture
async def client(site: Site) -> AsyncIterator[Client]:
    async with site.client() as client:
        yield client
    await until(site.admitted, 0)  # no test leaves one in flight


# 64 at once ---------------------------------------------------------------------------------------

EXPRESSIONS = ("vqa", "ocr@1.5", "none", "vqa@0.5+ocr", "cap@2", "vqa@-1+cap@2")


@dataclass(frozen=True)
class Sent:
    """One request of many, with the expression that should steer it and the route."""

    question: Question
    options: dict[str, Any]
    expression: str
    route: str


def named(way: str, expression: str) -> tuple[dict[str, Any], str, str]:
    """A request that names its steering in one of the ways: options of the client's call, the expression, the route."""
    return {
        "body": ({"extra_body": {"hones_task": expression}}, expression, "body"),
        "xargs": ({"extra_body": {"vllm_xargs": {"hones_task": expression}}}, expression, "body"),
        "header": ({"extra_headers": {"X-Hones-Task": expression}}, expression, "header"),
        "alias": ({"model": f"tiny:{expression}"}, expression, "alias"),
        "all": (
            {
                "extra_body": {"hones_task": expression},
                "extra_headers": {"X-Hones-Task": "ocr", "X-Tenant": "plain"},
                "model": "tiny:cap",
            },
            expression,
            "body",
        ),
        "rule": ({"extra_headers": {"X-Tenant": "documents"}}, "ocr", "rule"),
        "rule for none": ({"extra_headers": {"X-Tenant": "plain"}}, "none", "rule"),
        "default": ({}, "vqa@0.5", "default"),
    }[way]


def mixed(count: int, forms: Sequence[Form]) -> list[Sent]:
    """Requests of every form and every way of naming steering, with changing expressions and questions."""
    ways = ("body", "xargs", "header", "alias", "all", "rule", "rule for none", "default", "header")
    requests = []
    for i in range(count):
        questions, form = forms[i % len(forms)]
        options, expression, route = named(ways[i % len(ways)], EXPRESSIONS[i * 7 // 3 % len(EXPRESSIONS)])
        extra = {"extra_body": {**options.pop("extra_body", {}), **form.get("extra_body", {})}}
        requests.append(Sent(questions[i % 4], {**options, **form, **extra}, expression, route))
    return requests


@dataclass(frozen=True)
class Burst:
    """A burst of 64 requests that were sent at once, and the metrics before and after."""

    sent: list[Sent]
    answers: list[Answer]
    before: Samples
    after: Samples


@pytest.fixture(scope="module")
async def burst(site: Site) -> Burst:
    sent = mixed(64, site.engine.forms)
    async with site.client() as client:
        before, tokens = await scrape(site.server.url), await site.tokens()
        answers = await asyncio.gather(*(ask(client, one.question, **one.options) for one in sent))
        with pytest.raises(openai.NotFoundError):  # counts nowhere
            await ask(client, TEXTS[0], model="tiny:wqa")
        await until(site.slots_used, 0)
        await until(site.tokens, tokens + sum(answer.tokens for answer in answers))
        return Burst(sent, answers, before, await scrape(site.server.url))


async def test_64_mixed_requests_at_once_each_get_the_answer_of_their_steering(site: Site, burst: Burst) -> None:
    for one, answer in zip(burst.sent, burst.answers, strict=True):
        assert answer.texts == [site.text(one.question, one.expression)] * one.options.get("n", 1), one
    steered = [one for one in burst.sent if one.expression != "none"]
    changed = [site.text(one.question, one.expression) != site.text(one.question, "none") for one in steered]
    assert sum(changed) >= 0.8 * len(changed)


async def test_their_headers_say_what_steered_them(site: Site, burst: Burst) -> None:
    expected = [(site.header(one.expression), one.route) for one in burst.sent]
    assert [(answer.profile, answer.route) for answer in burst.answers] == expected
    assert len(set(expected)) > 12


async def test_they_name_the_model_as_it_was_asked_for_where_that_decided(burst: Burst) -> None:
    asked = [one.options.get("model", "tiny") if one.route == "alias" else "tiny" for one in burst.sent]
    assert [answer.models for answer in burst.answers] == [{name} for name in asked]
    assert {"tiny", "tiny:ocr@1.5"} <= set(asked)


async def test_the_metrics_count_what_was_sent(burst: Burst) -> None:
    requests: Counter[tuple[str, str]] = Counter()
    tokens: Counter[tuple[str]] = Counter()
    for one, answer in zip(burst.sent, burst.answers, strict=True):
        names = parse_expression(one.expression).names
        label = "blend" if len(names) > 1 else names[0] if names else "none"
        requests[label, one.route] += 1
        tokens[(label,)] += answer.tokens
    assert increase(burst.before, burst.after, "hones_requests_total") == requests
    assert increase(burst.before, burst.after, "hones_tokens_total") == tokens
    assert sum(tokens.values()) == sum(NEW_TOKENS * one.options.get("n", 1) for one in burst.sent)
    assert burst.after[("hones_slots_used",)] == 0
    assert burst.after[("hones_profiles_loaded",)] == 3


# Names and refusals -------------------------------------------------------------------------------


async def test_scopes_at_once(site: Site, client: Client) -> None:
    """Asks each question in each scope, twice, so that the second finds what the first has left in a prefix cache."""
    scopes = ("prompt", "generated", "all")
    sent = [(question, scope) for question in (PICTURES[0], TEXTS[1]) for scope in scopes]
    for _ in range(2):
        asked = [{"extra_body": {"hones_task": "cap@2", "hones_scope": scope}} for _, scope in sent]
        answers = await asyncio.gather(
            *(ask(client, question, **more) for (question, _), more in zip(sent, asked, strict=True))
        )
        for answer, (question, scope) in zip(answers, sent, strict=True):
            site.check(answer, question, "cap@2", "body", scope)
    assert len({*(answer.texts[0] for answer in answers)}) >= 5
    with pytest.raises(openai.BadRequestError, match="the scope is 'answer'; give 'all', 'prompt' or 'generated'"):
        await ask(client, TEXTS[0], extra_body={"hones_task": "vqa", "hones_scope": "answer"})


async def test_models_lists_an_alias_for_each_profile(client: Client) -> None:
    models = [(model.id, model.model_extra["parent"]) async for model in await client.models.list()]
    assert models == [("tiny", None), ("tiny:cap", "tiny"), ("tiny:ocr", "tiny"), ("tiny:vqa", "tiny")]


async def test_who_has_no_key_learns_nothing(site: Site) -> None:
    body = {"model": "tiny", "prompt": "A", "hones_task": "unheard-of"}
    for path in ("/v1/completions", "/v1/models", "/v1/hones/profiles", "/v1/hones/steering"):
        method = "GET" if path.endswith(("models", "profiles")) else "POST"
        response = await site.call(method, path, body, Authorization="Bearer wrong")
        assert response.status_code == 401, path
        assert not [name for name in response.headers if name.startswith("x-hones")]
        assert "vqa" not in response.text


@only_vllm  # transformers': test_serve_command.py, as here it is started by a launcher of ours
async def test_the_key_is_not_in_the_process_list(site: Site) -> None:
    assert KEY.encode() not in Path(f"/proc/{site.server.process.pid}/cmdline").read_bytes()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"extra_body": {"hones_task": "wqa"}}, openai.BadRequestError, "known tasks: cap, ocr, vqa"),
        ({"extra_body": {"vllm_xargs": {"hones_task": "wqa"}}}, openai.BadRequestError, "known tasks: cap, ocr, vqa"),
        ({"extra_headers": {"X-Hones-Task": "vqa+wqa"}}, openai.BadRequestError, "'wqa'"),
        ({"model": "tiny:wqa"}, openai.NotFoundError, "'tiny:wqa' does not exist"),
        ({"model": "huge:vqa"}, openai.NotFoundError, "does not exist"),
        ({"extra_body": {"hones_task": "vqa@@2"}}, openai.BadRequestError, "vqa@@2"),
        ({"extra_headers": {"X-Hones-Task": "vqa +ocr"}}, openai.BadRequestError, "vqa +ocr"),
        ({"model": "tiny:vqa@99"}, openai.BadRequestError, "99"),
        ({"extra_body": {"hones_task": 3}}, openai.BadRequestError, "hones_task must be a string"),
        ({"extra_body": {"vllm_xargs": {"hones_digest": "0" * 64}}}, openai.BadRequestError, "reserved"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
async def test_what_is_unknown_or_malformed(
    client: Client, asked: dict[str, Any], error: type[openai.APIStatusError], words: str, stream: bool
) -> None:
    for question in (PICTURES[0], TEXTS[0]):
        with pytest.raises(error) as refused:
            await ask(client, question, stream=stream, **asked)
        assert words in refused.value.message
        assert refused.value.response.headers["content-type"] == "application/json"
        assert refused.value.body["code"] == refused.value.status_code


async def test_what_the_engine_refuses_is_neither_steered_nor_counted(site: Site, client: Client) -> None:
    before = await scrape(site.server.url)
    for extra in ({"top_p": "high"}, {"model": "huge"}, {"prompt": 5}):
        body = {"model": "tiny", "prompt": "A", "max_tokens": 2, "hones_task": "vqa", **extra}
        response = await site.call("POST", "/v1/completions", body)
        assert (response.status_code // 100, response.headers["x-hones-profile"]) == (4, "none"), extra
    response = await site.call("POST", "/v1/completions", body, **{"Content-Type": "text/plain"})
    assert (response.status_code // 100, response.headers["x-hones-profile"]) == (4, "none")
    site.check(await ask(client, PICTURES[0], model="tiny:vqa"), PICTURES[0], "vqa", "alias")
    counted = increase(before, await scrape(site.server.url), "hones_requests_total")
    assert counted == {("vqa", "alias"): 1}


@only_vllm  # transformers' server has no others
async def test_other_routes_that_generate_say_that_they_are_unsteered_and_count(site: Site) -> None:
    """Checks that a default in the routing file does not change that."""
    before, tokens = await scrape(site.server.url), await site.tokens()
    for path, body in site.engine.elsewhere:
        response = await site.call("POST", path, {"model": "tiny", **body})
        assert response.status_code == 200, response.text
        assert (response.headers["x-hones-profile"], response.headers["x-hones-route"]) == ("none", "path"), path
    response = await site.call("POST", "/v1/responses", {"model": "tiny", "input": "A", "temperature": "hot"})
    assert response.status_code // 100 == 4
    after = await scrape(site.server.url)
    assert increase(before, after, "hones_requests_total") == {("none", "path"): len(site.engine.elsewhere)}
    assert increase(before, after, "hones_unreached_defaults_total") == {("vqa",): len(site.engine.elsewhere)}
    assert await site.tokens() > tokens


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_responses_and_messages_are_steered_as_chats_are(
    site: Site, client: Client, path: str, stream: bool
) -> None:
    """Asks by the official clients, with a tool, and compares with the same chats, as others do with transformers."""
    messages: Any = [{"role": "user", "content": TEXTS[0].text}]
    if path == "/v1/messages" and isinstance(site.engine, Transformers):
        with pytest.raises(anthropic.NotFoundError):  # its server has no such route
            await parsed(site, path, messages, model="tiny:vqa", stream=stream)
        return
    before, texts = await scrape(site.server.url), {}
    for expression, scope, model, extra, route in (
        ("vqa", "all", "tiny:vqa", {}, "alias"),
        ("ocr@1.5", "all", "tiny", {"hones_task": "ocr@1.5"}, "body"),
        ("cap@2", "prompt", "tiny", {"hones_task": "cap@2", "hones_scope": "prompt"}, "body"),
        ("cap@2", "generated", "tiny:cap@2", {"hones_scope": "generated"}, "alias"),
        ("vqa@0.5", "all", "tiny", {}, "default"),
        ("none", "all", "tiny", {"hones_task": "none"}, "body"),
    ):
        steering = {"hones_task": expression, "hones_scope": scope}
        expected = await client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=NEW_TOKENS, temperature=0, extra_body=steering
        )
        headers, events = await parsed(site, path, messages, model=model, stream=stream, **extra)
        assert (headers["x-hones-profile"], headers["x-hones-route"]) == (site.header(expression, scope), route)
        answers = [getattr(event, "response", None) or getattr(event, "message", None) or event for event in events]
        (confirmed,) = [answer for answer in answers if "hones" in answer.model_extra]
        assert confirmed.model_extra["hones"] == confirmation(site.profiles, expression, route, scope)
        assert confirmed.model == model
        if stream:
            deltas = [event.delta for event in events if event.type in DELTAS]
            texts[expression, scope] = "".join(getattr(delta, "text", delta) for delta in deltas)
        else:
            parts = confirmed.content if path == "/v1/messages" else confirmed.output[0].content
            texts[expression, scope] = "".join(part.text for part in parts)
        assert texts[expression, scope] == expected.choices[0].message.content
    assert len(set(texts.values())) > 1
    counted = increase(before, await scrape(site.server.url), "hones_requests_total")
    assert counted[("vqa", "alias")] == 1
    assert ("none", "path") not in counted


async def parsed(
    site: Site, path: str, messages: Any, *, model: str, stream: bool, **extra: Any
) -> tuple[Any, list[Any]]:
    """The headers of an answer, and what the route's official client makes of it: a stream's events, or one object."""
    options: Any = {"model": model, "stream": stream, "extra_body": {"temperature": 0, **extra}}
    tool, takes = {"name": "look", "description": "Look."}, {"type": "object", "properties": {}}
    if path == "/v1/responses":
        options["tools"] = [{**tool, "type": "function", "parameters": takes, "strict": False}]
        async with site.client() as ai:
            raw: Any = await ai.responses.with_raw_response.create(
                input=messages, max_output_tokens=NEW_TOKENS, **options
            )
            answer = raw.parse()
            return raw.headers, [event async for event in answer] if stream else [answer]
    options["tools"] = [{**tool, "input_schema": takes}]
    url, key = site.server.url, site.key
    async with anthropic.AsyncAnthropic(base_url=url, auth_token=key, max_retries=0, timeout=300) as claude:
        raw = await claude.messages.with_raw_response.create(messages=messages, max_tokens=NEW_TOKENS, **options)
        answer = await raw.parse()
        return raw.headers, [event async for event in answer] if stream else [answer]


DELTAS = ("response.output_text.delta", "content_block_delta")


async def test_beams_cannot_be_steered(site: Site) -> None:
    beams = {"model": "tiny", "prompt": TEXTS[0].text, "max_tokens": 4, "use_beam_search": True, "n": 2}
    for way in ({"hones_task": "vqa"}, {}, {"model": "tiny:vqa"}):
        response = await site.call("POST", "/v1/completions", {**beams, **way})
        assert response.status_code == 400
        assert "beam search cannot be steered" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/chat/completions/batch", "/detokenize", "/invocations"])
async def test_other_routes_cannot_be_steered(site: Site, path: str) -> None:
    body = {"model": "tiny", "input": "A", "prompt": "A"}
    ways: list[tuple[dict[str, str], dict[str, str]]] = [
        ({"hones_task": "vqa"}, {}),
        ({}, {"X-Hones-Task": "vqa"}),
        ({"model": "tiny:vqa"}, {}),
    ]
    for named_in_body, headers in ways:
        response = await site.call("POST", path, {**body, **named_in_body}, **headers)
        assert response.status_code == 400
        assert "/v1/responses and /v1/messages can be steered" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
async def test_tokens_are_counted_for_a_model_by_its_alias(site: Site, path: str) -> None:
    if not isinstance(site.engine, Vllm):
        pytest.skip("transformers' server has no such route")
    body = {"messages": [{"role": "user", "content": "A red cat"}]}
    by_name, by_alias = [await site.call("POST", path, {**body, "model": name}) for name in ("tiny", "tiny:vqa")]
    assert by_name.status_code == by_alias.status_code == 200
    assert by_name.json() == by_alias.json()
    unknown = await site.call("POST", path, {**body, "model": "tiny:nope"})
    assert unknown.status_code == 404


async def test_health_and_browsers(site: Site) -> None:
    assert httpx.get(f"{site.server.url}/health").status_code == 200
    origin = {"Origin": ORIGIN}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-hones-task"}
    preflight = httpx.options(f"{site.server.url}/v1/chat/completions", headers={**origin, **asked})
    assert preflight.status_code == 200
    assert "x-hones-task" in preflight.headers["access-control-allow-headers"]
    refused = await site.call("POST", "/v1/completions", {"model": "tiny:wqa", "prompt": "A"}, **origin)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (404, origin["Origin"])
    assert (await site.call("OPTIONS", "/v1/chat/completions")).status_code == 405


async def test_the_playground_is_a_page_where_it_was_asked_for(site: Site, plain: Site) -> None:
    page = httpx.get(f"{site.server.url}/hones")  # whose calls need the key
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert (await plain.call("GET", "/hones")).status_code == 404


# The canary ---------------------------------------------------------------------------------------


async def test_a_canary_draws_by_key_and_never_flips(site: Site, client: Client) -> None:
    async def routes(question: Question, **options: Any) -> list[str]:
        headers = [{"X-Tenant": "trial", "X-Hones-Key": f"user {i}"} for i in range(24)]
        answers = await asyncio.gather(*(ask(client, question, extra_headers=h, **options) for h in headers))
        for answer in answers:
            site.check(answer, question, {"rule": "cap@2", "canary": "ocr@1.5"}[answer.route], answer.route)
        return [answer.route for answer in answers]

    drawn = await routes(TEXTS[0])
    assert set(drawn) == {"rule", "canary"}
    assert await routes(TEXTS[1], stream=True) == drawn
    # Who asks gets what it asks for.
    taken = {"X-Hones-Key": f"user {drawn.index('canary')}"}
    answer = await ask(client, TEXTS[0], model="tiny:cap@2", extra_headers=taken)
    site.check(answer, TEXTS[0], "cap@2", "alias")


# Changes while it runs ----------------------------------------------------------------------------


async def load(site: Site, path: str, name: str = "vqa") -> httpx.Response:
    return await site.call("POST", "/v1/hones/profiles", {"name": name, "path": path})


@contextmanager
def broken_profiles(site: Site) -> Iterator[dict[str, str]]:
    """Profile files that must not be loaded: path -> words of the refusal."""
    folder = site.folder / "bad"
    folder.mkdir()
    (folder / "broken.safetensors").write_bytes((site.folder / "vqa.safetensors").read_bytes()[:-7])
    (folder / "pickle.safetensors").write_bytes(b"\x80\x04N.")
    another_model = AutoModelForCausalLM.from_pretrained(make_llama(folder / "llama"))
    save_profile(random_profile(another_model, 0, "vqa"), folder / "other.safetensors")
    outside = site.folder.parent / "outside.safetensors"
    shutil.copy(site.folder / "vqa.safetensors", outside)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    try:
        yield {
            "bad/broken.safetensors": "broken.safetensors",
            "bad/pickle.safetensors": "pickle.safetensors",
            "bad/other.safetensors": "other.safetensors",
            "bad/nothing.safetensors": "nothing.safetensors",
            "bad": "bad",
            "../outside.safetensors": "leaves the folder",
            str(outside): "leaves the folder",
            "bad/link.safetensors": "leaves the folder",
            "bad/linked/outside.safetensors": "leaves the folder",
            "/dev/zero": "leaves the folder",
            "\0": "not a path",
        }
    finally:
        shutil.rmtree(folder)
        outside.unlink()


async def test_bad_profiles_are_refused_and_the_server_lives(site: Site, client: Client) -> None:
    before = await scrape(site.server.url)
    listed = (await site.call("GET", "/v1/hones/profiles")).json()
    with broken_profiles(site) as bad:
        for path, words in bad.items():
            response = await load(site, path)
            assert response.status_code == 400, path
            assert words in response.json()["error"]["message"]
        assert (await load(site, "vqa.safetensors", name="none")).status_code == 400
    assert (await site.call("GET", "/v1/hones/profiles")).json() == listed
    refused = increase(before, await scrape(site.server.url), "hones_profile_loads_total")
    assert refused == {("error",): len(bad) + 1}
    site.check(await ask(client, PICTURES[0], model="tiny:vqa"), PICTURES[0], "vqa", "alias")


@asynccontextmanager
async def running(
    site: Site, client: Client, group: asyncio.TaskGroup, model: str, count: int
) -> AsyncIterator[list[asyncio.Task[Answer]]]:
    """Start requests and stop the engine when each has brought some of its LONG tokens."""
    so_far = await site.admitted()
    started = [asyncio.Event() for _ in range(count)]
    options: dict[str, Any] = {"model": model, "stream": True, "count": LONG}
    with site.frozen():
        tasks = [group.create_task(ask(client, TEXTS[0], started=event, **options)) for event in started]
        await until(site.admitted, so_far + count)
    while not all(event.is_set() for event in started):
        await asyncio.sleep(SLICE)
        with site.frozen():  # a client that is slower than the engine catches up, before any answer is finished
            await asyncio.sleep(SLICE)
    with site.frozen():
        assert await site.slots_used() == 1
        yield tasks
        assert not any(task.done() for task in tasks)


async def test_a_replaced_profile_steers_only_what_comes_after(site: Site, client: Client) -> None:
    """Replaces a profile while requests run and wait in the engine's queue, and sends others afterwards."""

    def send() -> list[asyncio.Task[Answer]]:
        return [group.create_task(ask(client, question, model="tiny:vqa")) for question in PICTURES]

    try:
        async with asyncio.TaskGroup() as group, running(site, client, group, "tiny:vqa", site.engine.at_once) as tasks:
            so_far = await site.admitted()
            waiting = send()  # no more run at once
            await until(site.admitted, so_far + 4)
            response = await load(site, "next/vqa.safetensors")
            assert response.json()["digest"] == site.profiles["new"].digest
            after = send()
            await until(site.admitted, so_far + 8)
            assert await site.slots_used() == 2
    finally:
        await load(site, "vqa.safetensors")
    for task in tasks:
        site.check(task.result(), TEXTS[0], "vqa", "alias", count=LONG)
    for question, old, new in zip(PICTURES, waiting, after, strict=True):
        site.check(old.result(), question, "vqa", "alias")
        assert new.result().profile == f"vqa ({site.profiles['new'].short_digest})"
        assert new.result().texts == [site.text(question, "new")] != [site.text(question, "vqa")]
    site.check(await ask(client, PICTURES[0], model="tiny:vqa"), PICTURES[0], "vqa", "alias")


async def test_replacing_under_load_mixes_nothing(site: Site, client: Client) -> None:
    old, new = site.header("vqa"), f"vqa ({site.profiles['new'].short_digest})"
    answers: list[tuple[Question, Answer]] = []
    over = asyncio.Event()

    async def keep_asking(first: int) -> None:
        for i in itertools.count(first):
            question = (PICTURES + TEXTS)[i % 8]
            answers.append((question, await ask(client, question, stream=i % 3 == 0, model="tiny:vqa")))
            if over.is_set():
                break

    async def answered() -> int:
        return len(answers)

    async with asyncio.TaskGroup() as group:
        for first in range(12):
            group.create_task(keep_asking(first))
        for path in ("next/vqa.safetensors", "vqa.safetensors") * 2:
            await until(answered, len(answers) + 8)
            assert (await load(site, path)).status_code == 200
        over.set()
    for question, answer in answers:
        assert answer.texts == [site.text(question, {old: "vqa", new: "new"}[answer.profile])]
    assert {answer.profile for _, answer in answers} == {old, new}


async def test_an_unloaded_profile_steers_what_it_was_admitted_for(site: Site, client: Client) -> None:
    assert (await load(site, "next/vqa.safetensors", name="extra")).status_code == 200
    async with asyncio.TaskGroup() as group, running(site, client, group, "tiny:extra", count=1) as (task,):
        so_far = await site.admitted()
        waiting = group.create_task(ask(client, PICTURES[0], model="tiny:extra"))
        await until(site.admitted, so_far + 1)
        assert (await site.call("DELETE", "/v1/hones/profiles/extra")).status_code == 200
        with pytest.raises(openai.NotFoundError):
            await ask(client, PICTURES[0], model="tiny:extra")
    assert task.result().texts == [site.text(TEXTS[0], "new", LONG)]
    assert waiting.result().texts == [site.text(PICTURES[0], "new")]
    assert "tiny:extra" not in [model.id async for model in await client.models.list()]
    assert (await site.call("DELETE", "/v1/hones/profiles/extra")).status_code == 404
    assert (await site.call("DELETE", "/v1/hones/profiles/ocr")).status_code == 400  # the routing file needs it


async def test_the_kill_switch_acts_at_admission(site: Site, client: Client) -> None:
    async def switch(on: bool) -> None:
        assert (await site.call("POST", "/v1/hones/steering", {"enabled": on})).json() == {"enabled": on}

    try:
        async with asyncio.TaskGroup() as group, running(site, client, group, "tiny:ocr", count=1) as (task,):
            await switch(False)
            after = [group.create_task(ask(client, PICTURES[0], **way)) for way in ({}, {"model": "tiny:vqa"})]
            with pytest.raises(openai.BadRequestError):
                await ask(client, PICTURES[0], extra_body={"hones_task": "wqa"})
    finally:
        await switch(True)
    site.check(task.result(), TEXTS[0], "ocr", "alias", count=LONG)
    for late in after:
        site.check(late.result(), PICTURES[0], "none", "off")
    site.check(await ask(client, PICTURES[0]), PICTURES[0], "vqa@0.5", "default")


# Clients that go away -----------------------------------------------------------------------------

CLIENT = """
import json, sys, httpx
url, headers, body = json.loads(sys.argv[1])
with httpx.stream("POST", url, headers=headers, json=body, timeout=300) as response:
    for line in response.iter_lines():
        print(line, flush=True)
"""


def start_client(site: Site, **body: Any) -> "subprocess.Popen[str]":
    body = {"model": "tiny:vqa", "prompt": TEXTS[0].text, "max_tokens": 400, **site.engine.no_end, **body}
    what = [f"{site.server.url}/v1/completions", {"Authorization": f"Bearer {site.key}"}, body]
    return subprocess.Popen([sys.executable, "-c", CLIENT, json.dumps(what)], stdout=subprocess.PIPE, text=True)


async def test_a_killed_client_leaks_no_slot(site: Site, client: Client) -> None:
    """Holds up the engine meanwhile, so that a slot cannot come back because its request has finished."""
    so_far, tokens = await site.admitted(), await site.tokens()
    with ExitStack() as clients:
        with site.frozen():
            streaming = clients.enter_context(start_client(site, stream=True))
            await until(site.admitted, so_far + 1)  # or the other one could be first
            waiting = clients.enter_context(start_client(site, hones_task="ocr"))
            await until(site.admitted, so_far + 2)
        assert streaming.stdout is not None
        assert streaming.stdout.readline().startswith("data: ")
        with site.frozen():
            assert await site.slots_used() == 2
            for process in (streaming, waiting):
                os.kill(process.pid, signal.SIGKILL)
            await until(site.slots_used, 0)
    site.check(await ask(client, PICTURES[0], model="tiny:cap@2"), PICTURES[0], "cap@2", "alias")

    async def in_the_engine() -> float:
        samples = await scrape(site.server.url)
        return sum(value for (name, *_), value in samples.items() if name == "vllm:num_requests_running")

    await until(in_the_engine, 0)  # transformers' server is done with them: it has answered a later request
    assert await site.tokens() < tokens + 400  # nobody generates for those who have left


@only_transformers
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_who_has_left_before_its_turn_has_none(site: Site, client: Client, stream: bool) -> None:
    before = await scrape(site.server.url)

    async def only_the_first_is_in() -> float:
        return await site.slots_used() == 1

    async with asyncio.TaskGroup() as group, running(site, client, group, "tiny:vqa", count=1):
        so_far = await site.admitted()
        waiting = start_client(site, stream=stream, hones_task="cap")
        await until(site.admitted, so_far + 1)
        os.kill(waiting.pid, signal.SIGKILL)
        await until(only_the_first_is_in, 1)
        waiting.communicate()
        after = group.create_task(ask(client, PICTURES[0], model="tiny:ocr"))
    site.check(after.result(), PICTURES[0], "ocr", "alias")
    tokens = increase(before, await scrape(site.server.url), "hones_tokens_total")
    assert tokens == {("vqa",): LONG, ("ocr",): NEW_TOKENS}
    left = "A client has left before its turn: nothing is generated for it"
    assert left in site.server.log.read_text()


# The plain way ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(engine: Vllm | Transformers, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A Llama with room for two profiles at once, served by the engine's own command where it has one."""
    here = tmp_path_factory.mktemp("plain")
    model, folder = AutoModelForCausalLM.from_pretrained(llama), here / "profiles"
    profiles = write_profiles(model, folder)
    reference = Reference(model, folder)
    command, env = engine.serve_for_two(llama, folder, here)
    # Metrics are files then, as where several processes serve.
    (here / "metrics").mkdir()
    with server(command, here / "log", {**env, "PROMETHEUS_MULTIPROC_DIR": str(here / "metrics")}) as running:
        yield Site(engine, running, folder, profiles, reference, AutoTokenizer.from_pretrained(llama))


WORDS = Question("w17 w42 w3")


async def test_beyond_the_slots_429_until_there_is_room(plain: Site) -> None:
    async with plain.client() as client, asyncio.TaskGroup() as group:
        so_far = await plain.admitted()
        with plain.frozen():
            in_flight = {
                expression: group.create_task(ask(client, WORDS, model=f"tiny:{expression}", stream=stream))
                for expression, stream in (("vqa", False), ("ocr", True), ("none", False))
            }
            await until(plain.admitted, so_far + 3)
            assert await plain.slots_used() == 2
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError, match="2 other profiles are in use") as refused:
                    await ask(client, WORDS, model="tiny:vqa@0.5", stream=stream)
                assert refused.value.response.headers["x-hones-profile"] == "none"
            in_flight["ocr@1"] = group.create_task(ask(client, WORDS, model="tiny:ocr@1"))  # one of those in use
            await until(plain.admitted, so_far + 4)
        for expression, task in in_flight.items():
            plain.check(await task, WORDS, expression, "alias")
        plain.check(await ask(client, WORDS, model="tiny:vqa@0.5"), WORDS, "vqa@0.5", "alias")
        await until(plain.slots_used, 0)


async def test_a_model_named_like_an_alias_is_itself_and_the_log_says_so(plain: Site) -> None:
    async with plain.client() as client:
        plain.check(await ask(client, WORDS, model=TAKEN), WORDS, "none", "default")
    assert f"{TAKEN!r} is the name of a model or LoRA adapter" in plain.server.log.read_text()


async def test_nothing_can_be_changed_unless_it_was_allowed(plain: Site) -> None:
    assert [profile["name"] for profile in (await plain.call("GET", "/v1/hones/profiles")).json()["data"]] == [
        *("cap", "ocr", "vqa")
    ]
    changes = [
        ("POST", "/v1/hones/profiles", {"name": "vqa", "path": "ocr.safetensors"}),
        ("DELETE", "/v1/hones/profiles/vqa", None),
        ("POST", "/v1/hones/steering", {"enabled": False}),
    ]
    for method, path, body in changes:
        response = await plain.call(method, path, body)
        assert response.status_code == 403, path
        assert "--allow-profile-updates" in response.json()["error"]["message"]
    async with plain.client() as client:
        plain.check(await ask(client, WORDS, extra_body={"hones_task": "vqa"}), WORDS, "vqa", "body")


# Servers that must not start ----------------------------------------------------------------------


def refusal(command: list[str], env: dict[str, str]) -> str:
    """The output of a server that ends with an error and leaves no process behind, which would keep the pipe open."""
    done = subprocess.run(
        [*command, "--port", str(free_port())],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0, done.stdout
    return done.stdout


@only_vllm
async def test_routes_that_take_whole_sampling_parameters_cannot_be_steered(plain: Site) -> None:
    """Sends steering in sampling parameters, which do not pass the middleware."""
    for extra, status in (({"mine": 1}, 200), ({"hones_task": "vqa"}, 400), ({"hones_scope": "all"}, 400)):
        params = {"max_tokens": 2, "extra_args": extra}
        body = {"model": "tiny", "token_ids": [17, 42], "sampling_params": params}
        response = await plain.call("POST", "/inference/v1/generate", body)
        assert response.status_code == status, response.text
        assert (response.headers.get("x-hones-route") == "path") == (
            status == 200
        )  # counts as any other that generates
        if status == 400:
            assert "hones_" in response.json()["error"]["message"]


@pytest.mark.matrix  # as in this process: engine/test_vllm_refusals.py
@only_vllm
def test_without_its_http_side_the_server_does_not_start(llama: Path, plain: Site) -> None:
    assert "set VLLM_PLUGINS=hones, or use `hones serve`" in refusal(api_server(llama), plain_env(plain.folder))


@pytest.mark.matrix  # as in this process: engine/test_vllm_refusals.py
@only_vllm
def test_where_its_http_side_cannot_be_made_the_server_does_not_start(llama: Path, plain: Site, tmp_path: Path) -> None:
    """Hides a module that only the HTTP side needs; vLLM logs that, and would go on."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['hones_serving.playground'] = None")
    env = plain_env(plain.folder, VLLM_PLUGINS="hones")
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    said = refusal(api_server(llama), env)
    assert "import of hones_serving.playground halted" in said
    assert "StateError: HONES_PROFILES is set, but vLLM could not make the HTTP side of hones-steer" in said


@pytest.mark.matrix
def test_with_a_profile_of_another_model_the_server_does_not_start(
    engine: Vllm | Transformers, llama: Path, tmp_path: Path
) -> None:
    another_model = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "other", seed=1))
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    save_profile(random_profile(another_model, 0, "vqa"), profiles / "vqa.safetensors")
    # A model of the same shapes: only the loaded weights tell.
    said = refusal(*engine.serve_for_two(llama, profiles, tmp_path))
    assert "vqa.safetensors: the profile belongs to another model" in said
