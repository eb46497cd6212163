"""Behavior that only the transformers engine has; `test_http.py` tests what both engines share."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hones_serving.settings import Settings
from hones_serving.transformers_server.app import build_app, pinned
from hones_serving.transformers_server.generation import SteeredGeneration
from hones_serving.transformers_server.rows import Listener, Streamed, Whole
from hones_serving.transformers_server.turns import Turn, Turns
from prometheus_client import CollectorRegistry
from serving.engines import Server, free_port, server
from serving.http_helpers import Question, scrape, until
from serving.sites import Transformers
from serving.steered import TASKS, Reference, write_profiles
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import DirectStreamer, GenerationState

from hones_steer import StateError

pytestmark = pytest.mark.anyio

WORDS = "w17 w42 w3"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def profiles(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "profiles"
    write_profiles(AutoModelForCausalLM.from_pretrained(llama), folder)
    return folder


@asynccontextmanager
async def client_of(manager: ModelManager, profiles: Path) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(profiles, allow_updates=True)
    app = build_app(settings, manager, ["tiny", "also"], collector=CollectorRegistry())
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
async def text(llama: Path, profiles: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A server of a Llama."""
    async with client_of(pinned(str(llama), device="cpu"), profiles) as client:
        yield client


@pytest.fixture(scope="module")
async def vlm(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """A server of the embedded model, without profiles at first."""
    async with client_of(pinned(str(embedded), device="cpu"), tmp_path_factory.mktemp("none")) as client:
        yield client


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(COMPLETIONS, json={"model": "tiny", "prompt": WORDS, "max_tokens": 8, **body})


async def chat(client: httpx.AsyncClient, content: Any = WORDS, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    return await client.post(CHAT, json={"model": "tiny", "messages": messages, "max_tokens": 8, **body})


def said(response: httpx.Response, status: int) -> str:
    """The message in a response's error."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    return str(error["message"])


# Never silently unsteered -------------------------------------------------------------------------


async def test_tokens_are_those_of_generate(llama: Path, profiles: Path, text: httpx.AsyncClient) -> None:
    reference = Reference(AutoModelForCausalLM.from_pretrained(llama), profiles)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompt = tokenizer(WORDS)["input_ids"]
    expressions = [*TASKS, "vqa@0.5+ocr", "none"]
    expected = [tokenizer.decode(reference.tokens(prompt, e, 8), skip_special_tokens=True) for e in expressions]
    answers = [(await complete(text, hones_task=e)).json()["choices"][0]["text"] for e in expressions]
    assert answers == expected
    assert len(set(answers)) >= 4


async def test_requests_that_come_together_are_each_steered_as_admitted(text: httpx.AsyncClient) -> None:
    async def by_response(expression: str) -> str:
        asked = {"model": "tiny", "input": WORDS, "stream": False, "max_output_tokens": 8, "hones_task": expression}
        answer = (await text.post("/v1/responses", json=asked)).raise_for_status().json()
        return str(answer["output"][0]["content"][0]["text"])

    async def by_chat(expression: str) -> str:
        answer = (await chat(text, hones_task=expression)).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"])

    expressions = [*TASKS, "vqa@0.5+ocr", "none"] * 2
    alone = [await by_chat(expression) for expression in expressions]
    chats = asyncio.gather(*map(by_chat, expressions))
    responses = asyncio.gather(*map(by_response, expressions))
    assert await chats == alone
    assert await responses == alone
    assert len(set(alone)) >= 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("task", ["vqa", "none"])
async def test_a_model_that_was_loaded_anew_does_not_answer(
    llama: Path, profiles: Path, task: str, stream: bool
) -> None:
    manager = pinned(str(llama), device="cpu")
    async with client_of(manager, profiles) as client:
        assert (await complete(client, hones_task=task, stream=stream)).status_code == 200
        manager.shutdown()  # what its idle timer and /reset do; the next request loads the model
        assert "loaded anew, without its steering" in said(await complete(client, hones_task=task, stream=stream), 500)


async def test_a_version_with_other_functions_is_refused(
    llama: Path, profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = pinned(str(llama), device="cpu")

    def get_manager(self: object, modality: str) -> None: ...

    monkeypatch.setattr(GenerationState, "get_manager", get_manager)
    with pytest.raises(StateError, match=r"not supported: .*takes self, modality instead of .*; tested: 5\.19"):
        build_app(Settings(profiles), manager, ["tiny"], collector=CollectorRegistry())


# One model, under its names -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/audio/transcriptions", "/v1/systemone"])
async def test_clients_cannot_load_or_drop_models(text: httpx.AsyncClient, path: str) -> None:
    assert "Not Found" in said(await text.post(path, json={"model": "tiny"}), 404)


async def test_every_name_is_the_model(text: httpx.AsyncClient) -> None:
    listed = [model["id"] for model in (await text.get("/v1/models")).json()["data"]]
    assert listed == ["tiny", "also", *(f"{name}:{task}" for name in ("tiny", "also") for task in sorted(TASKS))]
    for asked, named in (("also", "also"), ("also:vqa", "also:vqa"), (None, "tiny")):
        assert (await complete(text, model=asked)).json()["model"] == named
        assert (await chat(text, model=asked)).json()["model"] == named
    assert "'huge' does not exist" in said(await chat(text, model="huge"), 404)
    assert "3 does not exist" in said(await chat(text, model=3), 404)


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_are_steered_as_chats_are(text: httpx.AsyncClient, stream: bool) -> None:
    answers = set()
    for task in (*TASKS, "none"):
        asked = {"model": "tiny", "input": WORDS, "stream": stream, "max_output_tokens": 8, "hones_task": task}
        response = (await text.post("/v1/responses", json=asked)).raise_for_status()
        as_chat = await chat(text, hones_task=task)
        for name in ("x-hones-profile", "x-hones-route"):
            assert response.headers[name] == as_chat.headers[name]
        if stream:
            events = [
                json.loads(line.removeprefix("data: ")) for line in response.text.split("\n") if "data: {" in line
            ]
            answer = events[-1]["response"]
            times = [event["response"]["created_at"] for event in events if "response" in event]
        else:
            answer = response.json()
            times = [answer["created_at"]]
        assert all(type(time) is int for time in times)  # LiteLLM's proxy takes no others
        assert answer["model"] == "tiny"
        assert answer["hones"] == as_chat.json()["hones"]
        said = answer["output"][0]["content"][0]["text"]
        assert said == as_chat.json()["choices"][0]["message"]["content"]
        answers.add(said)
    assert len(answers) == len(TASKS) + 1


# Fields that transformers' server ignores ---------------------------------------------------------

IGNORED = [
    (chat, {"n": 2}),
    (chat, {"logprobs": True}),
    (chat, {"response_format": {"type": "json_object"}}),
    (chat, {"tool_choice": "required"}),
    (complete, {"best_of": 2}),
    (complete, {"echo": True}),
    (complete, {"presence_penalty": 0.5}),
]


@pytest.mark.parametrize(("send", "field"), IGNORED, ids=lambda value: str(value)[:20])
async def test_what_would_be_ignored_is_refused(
    text: httpx.AsyncClient, send: Callable[..., Any], field: dict[str, Any]
) -> None:
    message = said(await send(text, **field), 400)
    assert message == f"{next(iter(field))!r} is not supported by the transformers engine; leave it out"


async def test_what_makes_no_difference_is_not(text: httpx.AsyncClient) -> None:
    nothing = {"n": 1, "logprobs": False, "tool_choice": "auto", "response_format": None, "user": "me", "store": False}
    assert (await chat(text, **nothing)).status_code == 200
    assert "top_k" in said(await chat(text, top_k=1), 422)


async def test_stop_strings_for_a_model_with_a_processor(vlm: httpx.AsyncClient) -> None:
    whole, stopped = [await chat(vlm, "A red ring is in the top left.", **body) for body in ({}, {"stop": ["\n\n"]})]
    assert whole.status_code == stopped.status_code == 200, stopped.text
    assert whole.json()["choices"] == stopped.json()["choices"]


async def test_a_maximum_by_its_newer_name(text: httpx.AsyncClient) -> None:
    answer = await chat(text, max_completion_tokens=3)
    assert answer.json()["usage"]["completion_tokens"] == 3


async def test_a_temperature_samples(text: httpx.AsyncClient) -> None:
    async def texts(*seeds: int) -> set[str]:
        return {(await complete(text, temperature=1, seed=seed)).json()["choices"][0]["text"] for seed in seeds}

    assert len(await texts(1, 2, 3)) == 3
    assert len(await texts(4, 4)) == 1


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"[]", b"{", b'"x"', b""])
async def test_a_body_that_is_no_object(text: httpx.AsyncClient, body: bytes) -> None:
    answer = await text.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert "the body is no JSON object" in said(answer, 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": None},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "assistant", "tool_calls": ["look"]}]},
        {"max_tokens": "many"},
        {"max_tokens": 0},
        {"temperature": "hot"},
        {"seed": "x"},
        {"seed": 2**64},
        {"generation_config": "{"},
    ],
    ids=str,
)
async def test_fields_that_mean_nothing(text: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    for steering in ("none", "vqa"):
        assert "cannot be answered" in said(await chat(text, hones_task=steering, **fields), 400)
    assert (await chat(text, hones_task="vqa")).status_code == 200


async def test_an_empty_prompt(text: httpx.AsyncClient) -> None:
    for task in ("none", "vqa"):
        answers = await asyncio.gather(*(complete(text, prompt=p, hones_task=task) for p in (WORDS, "", WORDS, "")))
        said = [answer.json()["choices"][0]["text"] for answer in answers]
        assert said[:2] == said[2:]
        assert answers[1].json()["usage"] == {"completion_tokens": 8, "prompt_tokens": 1, "total_tokens": 9}


async def test_several_prompts_in_one_request(text: httpx.AsyncClient) -> None:
    assert said(await complete(text, prompt=[WORDS, WORDS]), 400) == "prompt must be a string."


def picture(url: Any) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]


async def test_a_text_model_is_not_shown_images(text: httpx.AsyncClient) -> None:
    content = Question("What is this?", an_image()).arguments()["messages"][0]["content"]
    assert said(await chat(text, content), 400) == "this model cannot take a part of the type 'image_url'"


def an_image() -> Any:
    from hones_offline.data.scenes import scenes

    return scenes("test", 1)[0].image()


async def test_files_of_the_server_are_not_opened(vlm: httpx.AsyncClient, tmp_path: Path) -> None:
    an_image().save(tmp_path / "secret.png")
    for url in (str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png"):
        assert "has no data:, https:// or http:// URL" in said(await chat(vlm, picture(url)), 400)


async def test_an_image_that_is_none(vlm: httpx.AsyncClient) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"no image").decode()
    for wrong in (url, 5):
        assert "cannot be answered" in said(await chat(vlm, picture(wrong)), 400)


# Told to stop -------------------------------------------------------------------------------------

ENGINE = Transformers()
ANSWER = 40  # tokens


@asynccontextmanager
async def gated(
    model: Path, profiles: Path, here: Path, *options: str, prefix: tuple[str, ...] = ()
) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    """A server that `ENGINE.frozen` can keep from generating, and a client of it."""
    command, env = ENGINE.serve(model, here, "--profiles", str(profiles), "--served-model-name", "tiny", *options)
    with server([*prefix, *command], here / "log", env) as running:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=running.url, timeout=300, limits=limits) as client:
            yield running, client


async def stream(client: httpx.AsyncClient, begun: asyncio.Event, **body: Any) -> list[Any]:
    """The events of a stream of ANSWER tokens; sets `begun` when its status arrives, which is when its turn begins."""
    body = {"model": "tiny", "prompt": WORDS, "max_tokens": ANSWER, "stream": True, **body}
    async with client.stream("POST", COMPLETIONS, json=body) as response:
        assert response.status_code == 200
        begun.set()
        return [json.loads(line.removeprefix("data: ")) async for line in response.aiter_lines() if line]


async def ended(process: "subprocess.Popen[bytes]") -> int:
    """The exit code of a process that ends by itself."""
    return await asyncio.to_thread(process.wait, 120)


async def test_told_to_stop_it_finishes_the_answer_and_refuses_who_waits(
    llama: Path, profiles: Path, tmp_path: Path
) -> None:
    begun = asyncio.Event()
    async with gated(llama, profiles, tmp_path, "--shutdown-timeout", "600") as (running, client):

        async def admitted() -> float:
            return (await scrape(running.url))[("hones_requests_in_flight",)]

        async with asyncio.TaskGroup() as group:
            with ENGINE.frozen(running, tmp_path):
                answer = group.create_task(stream(client, begun, hones_task="vqa"))
                await begun.wait()
                requests = [(complete, False), (complete, True), (chat, False), (chat, True)] * 25
                waiting = [group.create_task(send(client, stream=streamed)) for send, streamed in requests]
                await until(admitted, 1 + len(waiting))
                running.process.terminate()
                refused = [await task for task in waiting]  # though nothing is generated meanwhile
                late = [await complete(client, hones_task="vqa"), await client.get("/health")]
                assert (await client.get("/metrics")).status_code == 200
                assert not answer.done()
        for response in refused + late:
            assert "the server is stopping; send the request to another one" in said(response, 503)
            assert response.headers["Retry-After"] == "1"
        assert answer.result()[-1]["usage"]["completion_tokens"] == ANSWER
        assert await ended(running.process) == 0


@pytest.mark.matrix
async def test_a_load_of_2000_requests_some_of_which_leave_and_then_sigterm(
    llama: Path, profiles: Path, tmp_path: Path
) -> None:
    """Loses none and leaves nothing behind: each request has its own answer, or is refused when the server stops."""
    reference = Reference(AutoModelForCausalLM.from_pretrained(llama), profiles)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    expressions = [*TASKS, "vqa@0.5+ocr", "none"]
    texts = [" ".join(f"w{i + 3 * j}" for j in range(3 + i)) for i in range(8)]
    expected = {
        (text, e): tokenizer.decode(reference.tokens(tokenizer(text)["input_ids"], e, 8), skip_special_tokens=True)
        for text in texts
        for e in expressions
    }
    assert len(set(expected.values())) > 20
    outcomes: Counter[str] = Counter()

    async def one(client: httpx.AsyncClient, i: int) -> None:
        text, expression = texts[i % 8], expressions[i % 5]
        body = {"model": "tiny", "prompt": text, "hones_task": expression}
        if i % 5 == 3:
            async with client.stream("POST", COMPLETIONS, json={**body, "stream": True, "max_tokens": 200}) as response:
                outcomes["left" if response.status_code == 200 else "refused"] += 1
            return
        response = await client.post(COMPLETIONS, json={**body, "max_tokens": 8})
        if response.status_code == 503:
            outcomes["refused"] += 1
            return
        assert response.json()["choices"][0]["text"] == expected[text, expression]
        outcomes["answered"] += 1

    async def answered() -> int:
        return outcomes["answered"]

    async with gated(llama, profiles, tmp_path) as (running, client):

        async def in_flight() -> float:
            return (await scrape(running.url))[("hones_requests_in_flight",)]

        numbers = iter(range(1800))

        async def keep_asking() -> None:
            for i in numbers:
                await one(client, i)

        await asyncio.gather(*(keep_asking() for _ in range(48)))
        assert outcomes == {"answered": 1440, "left": 360}
        await until(in_flight, 0)
        assert (await scrape(running.url))[("hones_slots_used",)] == 0
        async with asyncio.TaskGroup() as group:
            with ENGINE.frozen(running, tmp_path):
                for i in range(1800, 2000):
                    group.create_task(one(client, i))
                await until(in_flight, 199)  # the one that has begun may be a stream, whose client has left
            await until(answered, 1445)
            running.process.terminate()
        assert await ended(running.process) == 0
    assert sum(outcomes.values()) == 2000
    assert outcomes["refused"] > 0
    assert "Traceback" not in (tmp_path / "log").read_text()


async def test_an_answer_that_takes_longer_than_the_limit_is_cut_off(
    llama: Path, profiles: Path, tmp_path: Path
) -> None:
    """Stops the server with a signal that was ignored where it was started, as SIGINT is in a shell's background."""
    begun = asyncio.Event()
    ignoring = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
    async with gated(llama, profiles, tmp_path, "--shutdown-timeout", "0", prefix=ignoring) as (running, client):
        async with asyncio.TaskGroup() as group:
            with ENGINE.frozen(running, tmp_path):
                answer = group.create_task(stream(client, begun))
                await begun.wait()
                running.process.send_signal(signal.SIGINT)
                assert await ended(running.process) == 0  # though the model is in the midst of a forward
        (event,) = answer.result()
        assert event == {"error": "the server has stopped before the answer was complete; send the request again"}


async def test_a_whole_answer_that_is_cut_off_is_an_error(llama: Path, profiles: Path) -> None:
    manager = pinned(str(llama), device="cpu")
    app = build_app(Settings(profiles), manager, ["tiny"], collector=CollectorRegistry())
    reached, gate = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        reached.set()
        gate.wait()

    next(iter(manager.loaded_models.values())).model.register_forward_pre_hook(wait)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=60) as client:
        try:
            answer = asyncio.create_task(complete(client, hones_task="vqa"))
            await asyncio.to_thread(reached.wait)
            await app.state.turns.drain(0)
            assert "before the answer was complete" in said(await answer, 503)
        finally:
            gate.set()
        app.state.turns.stopping = False
        assert (await complete(client)).status_code == 200  # so the thread is done with the one before


def test_nobody_waits_in_an_event_loop_that_is_closed(llama: Path) -> None:
    """The generation thread, which is told of no loop's end, goes on."""
    tokenizer = AutoTokenizer.from_pretrained(llama)

    async def ask() -> tuple[Turn, list[Listener]]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        streamer = DirectStreamer(tokenizer._tokenizer, loop, queue)
        return Turn(Turns()), [Whole(loop), Streamed(streamer, queue, loop)]

    turn, listeners = asyncio.run(ask())
    assert turn.begin()
    for listener in listeners:
        assert not listener.put(20)
        listener.end(torch.tensor([20]))
        listener.fail(ValueError("none"))
    turn.end()


def test_generation_can_be_stopped() -> None:
    before = threading.enumerate()
    generation = SteeredGeneration(None, None)  # type: ignore[arg-type]  # which it has no request for
    assert len(threading.enumerate()) == len(before) + 1
    generation.stop()
    assert threading.enumerate() == before


HANGING = """
import time
from fastapi import FastAPI
from hones_serving import listening
from hones_serving.transformers_server import stopping, turns

app = FastAPI()
app.state.turns = turns.Turns()

@app.get("/hang")
async def hang_in_the_event_loop():
    print("hanging", flush=True)
    time.sleep(1000)

sockets = listening.bind("127.0.0.1", 0)
print(sockets[0].getsockname()[1], flush=True)
stopping.serve(app, sockets, 0)
"""


async def test_a_server_that_hangs_ends_all_the_same() -> None:
    """Blocks the event loop, as transformers' server does while it fetches an image; nothing can cut that off."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HANGING], **pipes) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=10), timeout=60) as client:
            answer = asyncio.create_task(client.get(f"{url}/hang"))
            assert await asyncio.to_thread(process.stdout.readline) == "hanging\n"
            process.terminate()
            _, log = await asyncio.to_thread(process.communicate)
            with pytest.raises(httpx.TransportError):
                await answer
    assert process.returncode == 1
    assert "hang_in_the_event_loop" in log  # where it hung


async def test_told_to_stop_while_the_model_loads_it_ends_at_once(llama: Path, profiles: Path, tmp_path: Path) -> None:
    loading = tmp_path / "gate.loading"
    loading.touch()  # for good
    command, env = ENGINE.serve(llama, tmp_path, "--profiles", str(profiles))
    command += ["--host", "127.0.0.1", "--port", str(free_port())]
    with subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not loading.read_text():
            await asyncio.sleep(0.02)
        process.terminate()
        _, log = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, log
    assert log.splitlines()[-1] == "hones serve: stopped by SIGTERM before the model was loaded"
