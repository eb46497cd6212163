"""Programs of others, as they are published, against servers of both engines, by the recipes in docs/routing.md."""

import json
import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import torch
from install_clients import find_client
from nginx import nginx
from serving.engines import free_port, server
from serving.sites import ENGINES, TEXTS
from serving.steered import write_profiles
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 16  # LiteLLM's proxy asks for no fewer of a response
QUESTION = "What is in the picture?"  # that no profile answers with an end token at once
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
# What the proxy and lm-eval would fetch when they start.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}

pytestmark = pytest.mark.matrix  # the mechanism, a name as the model: test_every_route.py, with a gateway of the tests'
whole_or_stream = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@dataclass(frozen=True)
class Served:
    """Where a server or a gateway is, without /v1, its key, and the routes that it steers."""

    url: str
    key: str
    routes: tuple[str, ...] = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)


def recipe(begin: str, served: Served) -> str:
    """The block of the documentation that begins with `begin`, for a server of the model "tiny" at another address."""
    text = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
    found = re.search(rf"^```\w+\n({re.escape(begin)}.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, begin
    return re.sub(r"http://(localhost|127\.0\.0\.1):8000", served.url, found[1]).replace("llava", "tiny")


def program(client: str, name: str) -> str:
    found = find_client(client, name)
    assert found.exists(), f"{client} is not installed; `python tests/install_clients.py` installs it"
    return str(found)


@pytest.fixture(scope="module", params=ENGINES)
def served(
    request: pytest.FixtureRequest, embedded: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    here, key = tmp_path_factory.mktemp("served"), "a key"
    write_profiles(AutoModelForImageTextToText.from_pretrained(embedded, dtype=torch.float32), here / "profiles", 0.9)
    options = ["--profiles", str(here / "profiles"), "--served-model-name", "tiny", "--dtype", "float32"]
    command, env = ENGINES[request.param].serve(embedded, here, *options, "--api-key", key)
    with server(command, here / "log", env) as running:
        served = Served(running.url, key)
        yield served if request.param == "vllm" else replace(served, routes=served.routes[:-1])


@dataclass(frozen=True)
class Answer:
    """The text of an answer, the names of models and the objects ``hones`` in its JSON, its headers on steering."""

    text: str
    models: set[str]
    confirmed: list[Any]
    headers: dict[str, str]


def ask(at: Served, path: str, model: str, stream: bool = False, **body: Any) -> Answer:
    """Ask QUESTION by the official client of a route; `body` has fields that it does not know."""
    chat = [{"role": "user", "content": QUESTION}]
    options: Any = {"model": model, "stream": stream, "extra_body": {"temperature": 0, **body}}
    with (
        openai.OpenAI(base_url=f"{at.url}/v1", api_key=at.key, max_retries=0, timeout=300) as ai,
        anthropic.Anthropic(base_url=at.url, auth_token=at.key, max_retries=0, timeout=300) as claude,
    ):
        if path == CHAT:
            raw: Any = ai.chat.completions.with_raw_response.create(messages=chat, max_tokens=NEW_TOKENS, **options)
        elif path == COMPLETIONS:
            raw = ai.completions.with_raw_response.create(prompt=QUESTION, max_tokens=NEW_TOKENS, **options)
        elif path == RESPONSES:
            raw = ai.responses.with_raw_response.create(input=chat, max_output_tokens=NEW_TOKENS, **options)
        else:
            raw = claude.messages.with_raw_response.create(messages=chat, max_tokens=NEW_TOKENS, **options)
        parts = list(raw.parse()) if stream else [raw.parse()]
    objects = [getattr(part, "response", None) or getattr(part, "message", None) or part for part in parts]
    return Answer(
        "".join(map(text_of, parts)),
        {found.model for found in objects if getattr(found, "model", None)},
        [found.model_extra["hones"] for found in objects if "hones" in (found.model_extra or {})],
        {name.lower(): value for name, value in raw.headers.items() if "x-hones-" in name.lower()},
    )


def text_of(part: Any) -> str:
    """The text of a whole answer, or that which an event of a stream adds, on any route."""
    if hasattr(part, "choices"):
        said = [getattr(choice, "delta", None) or getattr(choice, "message", None) for choice in part.choices]
        return "".join(
            (one.content if one else choice.text) or "" for one, choice in zip(said, part.choices, strict=True)
        )
    if getattr(part, "type", None) in ("response.output_text.delta", "content_block_delta"):
        return str(getattr(part.delta, "text", part.delta))
    if hasattr(part, "output_text"):
        return str(part.output_text)
    return "".join(block.text for block in getattr(part, "content", None) or [] if hasattr(block, "text"))


# LiteLLM's proxy ------------------------------------------------------------------------------------------

# Where it keeps the object ``hones`` (route, streamed), and the routes whose headers it keeps.
KEEPS_BODY = {(CHAT, False), (COMPLETIONS, False), (RESPONSES, False), (RESPONSES, True)}
KEEPS_HEADERS = {CHAT, RESPONSES}


@pytest.fixture(scope="module")
def proxy(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    here, key = tmp_path_factory.mktemp("proxy"), f"sk-{secrets.token_hex(32)}"  # it starts with no weaker one
    config = here / "config.yaml"
    config.write_text(recipe("model_list:", served))
    command = [program("litellm", "litellm"), "--config", str(config)]
    env = {**OFFLINE, "HONES_KEY": served.key, "LITELLM_MASTER_KEY": key}
    with server(command, here / "log", env, "/health/liveliness") as running:
        yield Served(running.url, key)


@whole_or_stream
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
def test_through_litellms_proxy(served: Served, proxy: Served, path: str, stream: bool) -> None:
    """Compares with what the server answers to who asks it; the proxy makes chats of messages."""
    straight = COMPLETIONS if path == COMPLETIONS else CHAT
    texts = {ask(served, straight, "tiny", hones_task="none").text}
    for task, route in (("vqa", "alias"), ("ocr", "body")):
        expected = ask(served, straight, "tiny", hones_task=task)
        answer = ask(proxy, path, f"tiny-{task}", stream)
        assert answer.text == expected.text
        asked = {"alias": f"tiny:{task}", "body": "tiny"}[route]
        assert answer.models == {f"tiny-{task}", *([asked] if (path, stream) == (RESPONSES, True) else [])}
        kept = {f"llm_provider-{name}": value for name, value in expected.headers.items()}
        assert answer.headers == ({**kept, "llm_provider-x-hones-route": route} if path in KEEPS_HEADERS else {})
        confirmed = [{**expected.confirmed[0], "route": route}]
        assert answer.confirmed == (confirmed if (path, stream) in KEEPS_BODY else [])
        texts.add(answer.text)
    assert len(texts) == 3


# LangChain ------------------------------------------------------------------------------------------------

LANGCHAIN = """
import json, sys

asked = {"max_tokens": int(sys.argv[2]), "temperature": 0}
answers = []
for chat in (by_name, by_body):
    whole = chat.invoke(sys.argv[1], **asked)
    stream = chat.stream(sys.argv[1], **asked)
    answers.append(whole)
    answers.append(sum(stream, start=next(stream)))
print(json.dumps([[answer.content, answer.response_metadata] for answer in answers]))
"""


def test_by_langchain(served: Served) -> None:
    script = recipe("from langchain_openai", served).replace('"..."', repr(served.key)) + LANGCHAIN
    command = [program("langchain", "python"), "-c", script, QUESTION, str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    expected = ask(served, CHAT, "tiny", hones_task="vqa")
    for (text, metadata), (model, route) in zip(
        answers, [("tiny:vqa", "alias")] * 2 + [("tiny", "body")] * 2, strict=True
    ):
        assert (text, metadata["model_name"]) == (expected.text, model)
        assert metadata["headers"]["x-hones-profile"] == expected.headers["x-hones-profile"]
        assert metadata["headers"]["x-hones-route"] == route
        assert "hones" not in metadata
    assert expected.text != ask(served, CHAT, "tiny").text


# nginx ----------------------------------------------------------------------------------------------------


def test_through_nginx(served: Served, tmp_path: Path) -> None:
    """Asks on every route that the server has; a body of two million bytes is more than nginx itself would take."""
    port = free_port()
    location = recipe("location /v1/", served)
    with nginx(f"server {{ listen 127.0.0.1:{port};\n{location}\n}}", port, tmp_path) as url:
        for path in served.routes:
            for stream in (False, True):
                answer = ask(replace(served, url=url), path, "tiny:vqa", stream, user="u" * 2_000_000)
                assert answer == ask(served, path, "tiny:vqa", stream)
                assert answer.confirmed
                assert answer.headers


# lm-eval --------------------------------------------------------------------------------------------------


def test_lm_eval_measures_a_profile_by_its_name(served: Served, tmp_path: Path) -> None:
    """The right answers are those of the profile, so the exact match of its name is 1, and less without."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0, timeout=300) as ai:

        def right(question: str) -> str:
            chat: Any = [{"role": "user", "content": question}]
            said = ai.chat.completions.create(model="tiny:vqa", messages=chat, max_tokens=8, temperature=0)
            return (said.choices[0].message.content or "").strip()

        rows = [{"question": question.text, "answer": right(question.text)} for question in TEXTS]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "my_task.yaml").write_text(recipe("task: my_task", served))
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = recipe("lm_eval ", served).replace("\\\n", " ")
    env = {**os.environ, **OFFLINE, "OPENAI_API_KEY": served.key, "HF_HOME": str(tmp_path / "cache")}
    matches = []
    for name in ("tiny:vqa", "tiny"):
        _, *arguments = shlex.split(command.replace("model=tiny:vqa", f"model={name}"))
        out = tmp_path / name.replace(":", "-")
        done = subprocess.run(
            [program("lm_eval", "lm_eval"), *arguments, "--output_path", str(out)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (results,) = out.rglob("results_*.json")
        matches.append(json.loads(results.read_text())["results"]["my_task"]["exact_match,none"])
    assert matches[0] == 1
    assert matches[1] < 1
