"""Running servers of either engine, and the answers that they should give."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from hones_offline.data.scenes import scenes
from serving.engines import ENVIRONMENT, Server
from serving.http_helpers import NEW_TOKENS, Answer, Client, Question, frozen, scrape
from serving.steered import Reference

from hones_steer import Profile
from hones_steer.scopes import scoped_digest
from hones_steer.store import combine, parse_expression

SCENES = scenes("test", 4)
# Longer than the 32 tokens of a block, so that requests could share one with what steers them otherwise.
PICTURES = [Question(" ".join([scene.prompt("caption")] * 3), scene.image()) for scene in SCENES]
TEXTS = [Question(" ".join([scene.captions[0]] * 3)) for scene in SCENES]

Form = tuple[list[Question], dict[str, Any]]
FORMS: tuple[Form, ...] = ((PICTURES, {}), (TEXTS, {}), (PICTURES, {"stream": True}), (TEXTS, {"stream": True}))

TAKEN = "tiny:cap@9"  # a model's name that would else be an alias

# Requests by routes that cannot be steered: a path and a body.
Elsewhere = Sequence[tuple[str, dict[str, Any]]]
_HELLO = [{"role": "user", "content": "A red cat"}]

# A command without --host and --port, and the variables to add to the environment.
Command = tuple[list[str], dict[str, str]]


class Vllm:
    """The vLLM engine, with so many data-parallel replicas: by `hones serve`, and by vLLM's command with the plugin."""

    at_once = 8  # so many requests generate at the same time, however they are spread over replicas
    no_end: Mapping[str, Any] = {"ignore_eos": True}  # in a request's body: end tokens end nothing
    # vLLM calls n > 1 at temperature 0 an error.
    forms: Sequence[Form] = (*FORMS, (PICTURES, {"n": 2, "temperature": 1, "extra_body": {"top_k": 1}}))
    elsewhere: Elsewhere = (
        ("/v1/chat/completions/batch", {"messages": [_HELLO, _HELLO], "max_tokens": 2}),
        ("/invocations", {"messages": _HELLO, "max_tokens": 2}),
    )

    def __init__(self, replicas: int = 1) -> None:
        self._replicas = ["--data-parallel-size", str(replicas)]

    def serve(self, model: Path, here: Path, *options: str) -> Command:
        """Serve a model as "tiny" with any options of `hones serve`; `here` is a folder for this server."""
        del here
        command = [sys.executable, "-m", "hones_steer", "serve", str(model), "--engine", "vllm", *options]
        flags = ["--max-model-len", "512", "--max-num-seqs", str(self.at_once), "--block-size", "32"]
        return [*command, *flags, *self._replicas], ENVIRONMENT

    def serve_for_two(self, model: Path, profiles: Path, here: Path) -> Command:
        """Serve a model as "tiny" and `TAKEN`, with room for two profiles at once and no other option."""
        del here
        env = plain_env(profiles, VLLM_PLUGINS="hones", HONES_MAX_PROFILES="2")
        return [*api_server(model), "--enable-scale-out", *self._replicas], env

    def frozen(self, server: Server, here: Path) -> AbstractContextManager[None]:
        """Hold up the engine within the block: it generates nothing."""
        del here
        return frozen(server)

    def answer(self, tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
        """The text of `tokens` after `prompt`, with the space before a first word, without a character that is cut."""
        whole, known = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt + tokens, prompt))
        return whole.removeprefix(known).rstrip("\N{REPLACEMENT CHARACTER}")


class Transformers:
    """The transformers engine, by `hones serve --engine transformers`, whose batches of images nobody joins."""

    at_once = 1  # of images: a batch that has begun stays as it is
    no_end: Mapping[str, Any] = {}  # the model has no end token, see `serve`
    forms: Sequence[Form] = FORMS
    elsewhere: Elsewhere = ()

    def serve(self, model: Path, here: Path, *options: str) -> Command:
        """Serve a model as `Vllm.serve` does."""
        launcher = [sys.executable, str(Path(__file__).with_name("gated_server.py")), str(here / "gate")]
        return [*launcher, str(_without_end(model, here / "model")), "--engine", "transformers", *options], {}

    def serve_for_two(self, model: Path, profiles: Path, here: Path) -> Command:
        """Serve a model as `Vllm.serve_for_two` does."""
        return self.serve(
            model, here, "--profiles", str(profiles), "--max-profiles", "2", "--served-model-name", "tiny", TAKEN
        )

    @contextmanager
    def frozen(self, server: Server, here: Path) -> Iterator[None]:
        """Hold up the engine within the block, as `Vllm.frozen` does."""
        del server
        (here / "gate").touch()
        try:
            yield
        finally:
            (here / "gate").unlink()

    def answer(self, tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
        """The text of `tokens` without the prompt before them."""
        del prompt
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text


ENGINES: dict[str, Vllm | Transformers] = {"vllm": Vllm(), "transformers": Transformers()}


def _without_end(model: Path, folder: Path) -> Path:
    """A copy of a model that knows no end tokens: a request cannot ask transformers' server to ignore them."""
    shutil.copytree(model, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))
    return folder


def api_server(model: Path) -> list[str]:
    """Start vLLM's server by its own command."""
    module = "vllm.entrypoints.openai.api_server"
    options = [
        "--served-model-name",
        "tiny",
        TAKEN,
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "8",
    ]
    return [sys.executable, "-m", module, "--model", str(model), *options]


def plain_env(profiles: Path, **more: str) -> dict[str, str]:
    """The environment variables for vLLM's own command."""
    return {**ENVIRONMENT, "HONES_PROFILES": str(profiles), **more}


@dataclass(frozen=True)
class Site:
    """A server, and the answers that it should give."""

    engine: Vllm | Transformers
    server: Server
    folder: Path  # of profiles
    profiles: dict[str, Profile]
    reference: Reference
    processor: Any  # or tokenizer
    key: str = "none"
    known: dict[Any, str] = field(default_factory=dict)

    def client(self) -> Client:
        """An `openai` client with the key."""
        client = Client(api_key=self.key, base_url=f"{self.server.url}/v1", max_retries=0, timeout=300)
        client.no_end = self.engine.no_end
        return client

    async def call(self, method: str, path: str, body: object = None, **headers: str) -> httpx.Response:
        """A plain HTTP call with the key, which no client library checks or changes."""
        headers = {"Authorization": f"Bearer {self.key}", **headers}
        async with httpx.AsyncClient(base_url=self.server.url, timeout=300, verify=False) as client:
            return await client.request(method, path, json=body, headers=headers)

    def frozen(self) -> AbstractContextManager[None]:
        """Hold up the engine within the block: answers stay unfinished, and new requests stay queued."""
        return self.engine.frozen(self.server, self.folder.parent)

    async def slots_used(self) -> float:
        """Number of profiles that are in use at this moment."""
        return (await scrape(self.server.url))[("hones_slots_used",)]

    async def admitted(self) -> float:
        """Number of requests that are admitted and not yet answered to the end."""
        return (await scrape(self.server.url))[("hones_requests_in_flight",)]

    async def tokens(self) -> float:
        """Number of tokens generated so far."""
        return await self._total("hones_tokens_total")

    async def _total(self, metric: str) -> float:
        samples = await scrape(self.server.url)
        return sum(value for (name, *_), value in samples.items() if name == metric)

    def text(self, question: Question, expression: str, count: int = NEW_TOKENS, scope: str = "all") -> str:
        """The answer of transformers."""
        key = question.text, id(question.image), expression, count, scope
        if key not in self.known:
            tokens = self.reference.tokens(self._prompt(question), expression, count, scope)
            before = self._tokenizer(question.text)["input_ids"]
            self.known[key] = self.engine.answer(self._tokenizer, before, tokens)
        return self.known[key]

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _prompt(self, question: Question) -> Any:
        if question.image is None:
            return self._tokenizer(question.text)["input_ids"]
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), question.image

    def header(self, expression: str, scope: str = "all") -> str:
        """The value that X-Hones-Profile should have."""
        profile = combine(parse_expression(expression), self.profiles.__getitem__)
        if profile is None:
            return "none"
        applied = profile.short_digest if scope == "all" else f"{scoped_digest(profile.digest, scope)[:12]}; {scope}"
        return f"{expression} ({applied})"

    def check(
        self, answer: Answer, question: Question, expression: str, route: str, scope: str = "all", **options: int
    ) -> None:
        """Check everything that one answer says."""
        assert (answer.profile, answer.route) == (self.header(expression, scope), route)
        assert answer.texts == [self.text(question, expression, scope=scope, **options)] * len(answer.texts)


def confirmation(profiles: Mapping[str, Profile], expression: str, route: str, scope: str = "all") -> dict[str, Any]:
    """The object ``hones`` that the JSON of an answer should have."""
    profile = combine(parse_expression(expression), profiles.__getitem__)
    digest = None if profile is None else scoped_digest(profile.digest, scope)
    return {"profile": expression, "digest": digest, "route": route} | ({} if scope == "all" else {"scope": scope})
