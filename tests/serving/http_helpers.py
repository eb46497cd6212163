"""The client's side of a real server: questions, answers, the metrics, and a barrier around the engine."""

import asyncio
import base64
import io
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving.engines import Server

NEW_TOKENS = 12
DEADLINE_SECONDS = 300

# A name and its labels, sorted: ("hones_tokens_total", ("profile", "vqa")).
Samples = dict[tuple[Any, ...], float]


@dataclass(frozen=True)
class Question:
    """The single message of a chat if there is an image, else the prompt of a completion."""

    text: str
    image: Image.Image | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the `openai` client's call."""
        if self.image is None:
            return {"prompt": self.text}
        png = io.BytesIO()
        self.image.save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.text}]
        return {"messages": [{"role": "user", "content": content}]}


@dataclass(frozen=True)
class Answer:
    """The texts of a response's choices, its two headers, the tokens it says it cost, and the model it names."""

    texts: list[str]
    profile: str
    route: str
    tokens: int
    models: frozenset[str]  # that the response, or any event of a stream, names


class Client(AsyncOpenAI):
    """A client of one engine; `no_end` is the part of a body that keeps end tokens from ending an answer."""

    no_end: Mapping[str, Any]


async def ask(
    client: Client,
    question: Question,
    *,
    stream: bool = False,
    count: int = NEW_TOKENS,
    started: asyncio.Event | None = None,
    extra_body: dict[str, Any] | None = None,
    **options: Any,
) -> Answer:
    """Ask for `count` greedy tokens; sets `started` once a stream has brought text."""
    completions = client.completions if question.image is None else client.chat.completions
    if stream:
        options["stream_options"] = {"include_usage": True}
    raw = await completions.with_raw_response.create(
        **{"model": "tiny", "temperature": 0, **options},
        **question.arguments(),
        stream=stream,
        max_tokens=count,
        extra_body={**client.no_end, **(extra_body or {})},
    )
    texts, tokens, models = await _streamed(raw.parse(), started) if stream else _whole(raw.parse())
    return Answer(texts, raw.headers["x-hones-profile"], raw.headers["x-hones-route"], tokens, frozenset(models))


def _whole(response: Any) -> tuple[list[str], int, set[str]]:
    chosen = [choice.message.content if hasattr(choice, "message") else choice.text for choice in response.choices]
    return chosen, response.usage.completion_tokens, {response.model}


async def _streamed(chunks: AsyncIterator[Any], started: asyncio.Event | None) -> tuple[list[str], int, set[str]]:
    texts: dict[int, str] = {}
    tokens = 0
    models = set()
    async for chunk in chunks:
        models.add(chunk.model)
        for choice in chunk.choices:
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
            if text and started is not None:
                started.set()
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return [texts[index] for index in sorted(texts)], tokens, models


async def scrape(url: str) -> Samples:
    """The samples that Prometheus would read from a server at this moment."""
    async with httpx.AsyncClient(verify=False) as client:  # or each loads all certificates there are, 50 times a second
        text = (await client.get(f"{url}/metrics", timeout=DEADLINE_SECONDS)).raise_for_status().text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def increase(before: Samples, after: Samples, name: str) -> dict[tuple[str, ...], float]:
    """Growth of one metric's samples, those that have grown: label values, sorted by label -> number."""
    grown = {key: value - before.get(key, 0) for key, value in after.items() if key[0] == name}
    return {tuple(value for _, value in key[1:]): more for key, more in grown.items() if more}


async def until(number: Callable[[], Awaitable[float]], wanted: float) -> None:
    """Wait until a count reaches `wanted` or more, or 0 if that is wanted; fails if that takes a minute."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not ((now := await number()) >= wanted > 0 or now == wanted):
            await asyncio.sleep(0.02)


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Stop vLLM's engines until the block ends: requests that run stay unfinished, new ones stay queued."""
    engines = _engines(server.process.pid)
    assert engines
    for engine in engines:
        os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        for engine in engines:
            os.kill(engine, signal.SIGCONT)


def _engines(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _read(task / "children").split()
    ]
    return [child for child in children if _read(Path(f"/proc/{child}/comm")).startswith("VLLM::EngineCor")]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
