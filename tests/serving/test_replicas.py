"""Data parallelism: one API server before two replicas of the engine, each of which steers what it is given.

Requests say which replica is to answer. Expected texts are those of transformers, as in test_http.py.
"""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving.engines import server
from serving.http_helpers import NEW_TOKENS, Question, Samples, ask, increase, scrape, until
from serving.sites import ENGINES, Site, api_server, plain_env
from serving.steered import Reference, write_profiles
from tiny_models import random_profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from hones_steer import save_profile

pytestmark = [pytest.mark.anyio, pytest.mark.matrix]

REPLICAS = ("0", "1")
EXPRESSIONS = ("vqa", "ocr@1.5", "none", "vqa@0.5+ocr", "cap@2", "vqa@-1+cap@2")
QUESTIONS = [Question("w17 w42 w3"), Question("w5 w8 w13 w21")]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def site(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A Llama on two replicas, by vLLM's own command; profiles may be changed."""
    here = tmp_path_factory.mktemp("replicas")
    model, folder = AutoModelForCausalLM.from_pretrained(llama), here / "profiles"
    profiles = write_profiles(model, folder)
    reference = Reference(model, folder)
    (folder / "next").mkdir()
    profiles["new"] = random_profile(model, 99, "vqa")
    save_profile(profiles["new"], folder / "next" / "vqa.safetensors")
    reference.steering.load("new", folder / "next" / "vqa.safetensors")
    env = plain_env(folder, VLLM_PLUGINS="hones", HONES_ALLOW_PROFILE_UPDATES="1")
    command = [*api_server(llama), "--data-parallel-size", "2", "--enforce-eager"]
    with server(command, here / "log", env) as running:
        yield Site(ENGINES["vllm"], running, folder, profiles, reference, AutoTokenizer.from_pretrained(llama))
        assert running.process.poll() is None


def on(replica: str, expression: str) -> dict[str, Any]:
    """Options of a request that `replica` is to answer."""
    return {"extra_headers": {"X-data-parallel-rank": replica, "X-Hones-Task": expression}}


def answered(before: Samples, after: Samples) -> dict[str, float]:
    """How many requests each replica has finished in between, by vLLM's own count."""
    name = "vllm:generation_tokens_total"
    return {engine: tokens / NEW_TOKENS for (engine, _), tokens in increase(before, after, name).items()}


async def test_each_replica_gives_the_answers_of_their_steering(site: Site) -> None:
    sent = list(itertools.product(REPLICAS, EXPRESSIONS, QUESTIONS))
    before, tokens = await scrape(site.server.url), await site.tokens()
    async with site.client() as client:
        answers = await asyncio.gather(
            *(ask(client, question, **on(replica, expression)) for replica, expression, question in sent)
        )
    for (_, expression, question), answer in zip(sent, answers, strict=True):
        site.check(answer, question, expression, "header")
    assert len({site.text(QUESTIONS[0], expression) for expression in EXPRESSIONS}) == len(EXPRESSIONS)
    await until(site.slots_used, 0)
    await until(site.tokens, tokens + len(sent) * NEW_TOKENS)
    after = await scrape(site.server.url)
    assert answered(before, after) == dict.fromkeys(REPLICAS, len(sent) / 2)
    counted = increase(before, after, "hones_requests_total")
    each = len(REPLICAS) * len(QUESTIONS)
    blends = 2 * each
    assert counted == {(task, "header"): each for task in ("vqa", "ocr", "cap", "none")} | {("blend", "header"): blends}


async def test_scopes_hold_in_every_replica(site: Site) -> None:
    """Asks twice, so that the second time finds what the first has left in each replica's prefix cache."""
    sent = list(itertools.product(REPLICAS, ("prompt", "generated", "all"), QUESTIONS))
    async with site.client() as client:
        for _ in range(2):
            answers = await asyncio.gather(
                *(
                    ask(client, question, extra_body={"hones_scope": scope}, **on(replica, "cap@2"))
                    for replica, scope, question in sent
                )
            )
            for (_, scope, question), answer in zip(sent, answers, strict=True):
                site.check(answer, question, "cap@2", "header", scope)
    assert len({answer.texts[0] for answer in answers}) == len(sent) / len(REPLICAS)


async def test_a_replaced_profile_and_the_kill_switch_hold_for_every_replica(site: Site) -> None:
    question = QUESTIONS[0]
    assert site.text(question, "new") != site.text(question, "vqa")

    async def load(path: str) -> None:
        response = await site.call("POST", "/v1/hones/profiles", {"name": "vqa", "path": path})
        assert response.status_code == 200, response.text

    async def switch(enabled: bool) -> None:
        response = await site.call("POST", "/v1/hones/steering", {"enabled": enabled})
        assert response.status_code == 200, response.text

    async with site.client() as client:

        async def texts() -> list[tuple[list[str], str]]:
            """The answers of each replica to a request for "vqa", with the routes."""
            answers = [await ask(client, question, **on(replica, "vqa")) for replica in REPLICAS]
            return [(answer.texts, answer.route) for answer in answers]

        assert await texts() == [([site.text(question, "vqa")], "header")] * 2  # in each one's prefix cache from now on
        await load("next/vqa.safetensors")
        assert await texts() == [([site.text(question, "new")], "header")] * 2
        await switch(False)
        assert await texts() == [([site.text(question, "none")], "off")] * 2
        await switch(True)
        await load("vqa.safetensors")
        assert await texts() == [([site.text(question, "vqa")], "header")] * 2
