"""Several API servers of one vLLM server: before two replicas, each of which takes requests of each of them.

A client that keeps its connection stays with the API server that has accepted it. Expected texts are those of
transformers, as in test_http.py.
"""

import asyncio
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIConnectionError, APIStatusError, InternalServerError
from serving.engines import server
from serving.http_helpers import NEW_TOKENS, Client, Question, ask, increase, scrape, until
from serving.sites import Site, Vllm
from serving.steered import Reference, write_profiles
from tiny_models import random_profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from hones_steer import save_profile

pytestmark = [pytest.mark.anyio, pytest.mark.matrix]

SERVERS = (0, 1)
REPLICAS = ("0", "1")
EXPRESSIONS = ("vqa", "ocr@1.5", "none", "vqa@0.5+ocr")
QUESTION = Question("w17 w42 w3")
CANARY = "default: cap\ncanary: {task: cap, to: ocr, percent: 50}\n"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def unserved(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Profiles for a Llama, and the answers of transformers; the server is missing."""
    folder = tmp_path_factory.mktemp("servers") / "profiles"
    model = AutoModelForCausalLM.from_pretrained(llama)
    profiles = write_profiles(model, folder)
    reference = Reference(model, folder)
    (folder / "next").mkdir()
    profiles["new"] = random_profile(model, 99, "vqa")
    save_profile(profiles["new"], folder / "next" / "vqa.safetensors")
    reference.steering.load("new", folder / "next" / "vqa.safetensors")
    (folder.parent / "routing.yaml").write_text(CANARY)
    missing: Any = None
    return Site(Vllm(), missing, folder, profiles, reference, AutoTokenizer.from_pretrained(llama))


@contextmanager
def served(unserved: Site, llama: Path, replicas: int, *options: str) -> Iterator[Site]:
    """A Llama on so many replicas behind two API servers, by `hones serve`."""
    here, engine = unserved.folder.parent, Vllm(replicas)
    command, env = engine.serve(
        llama,
        here,
        *("--profiles", str(unserved.folder), "--served-model-name", "tiny", "--enforce-eager", "--dtype", "float32"),
        *("--api-server-count", "2", "--shutdown-timeout", "60", *options),
    )
    env = {**env, "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600"}
    with server(command, here / f"log-{replicas}", env) as running:
        yield replace(unserved, engine=engine, server=running)


@pytest.fixture(scope="module")
def site(unserved: Site, llama: Path) -> Iterator[Site]:
    """Two replicas behind two API servers; profiles may be changed."""
    routing = unserved.folder.parent / "routing.yaml"
    with served(unserved, llama, 2, "--allow-profile-updates", "--routing", str(routing)) as site:
        yield site


@asynccontextmanager
async def clients(site: Site) -> AsyncIterator[list[Client]]:
    """A client of each API server: connections are made until each has one."""
    limits = httpx.Limits(max_connections=1, keepalive_expiry=None)
    async with AsyncExitStack() as stack:
        found: dict[int, Client] = {}
        while len(found) < len(SERVERS):
            connection = httpx.AsyncClient(base_url=site.server.url, limits=limits, timeout=300)
            await stack.enter_async_context(connection)
            client = Client(
                api_key="none", base_url=f"{site.server.url}/v1", max_retries=0, timeout=300, http_client=connection
            )
            client.no_end = site.engine.no_end
            found[(await listing(client))["api_server"]] = client
        yield [found[index] for index in SERVERS]


async def call(client: Client, method: str, path: str, body: object = None) -> httpx.Response:
    """A call by the connection of a client."""
    return await client._client.request(method, path, json=body)


async def listing(client: Client) -> dict[str, Any]:
    return (await call(client, "GET", "/v1/hones/profiles")).raise_for_status().json()


def steered(expression: str, replica: str = "0") -> dict[str, Any]:
    """Options of a request that `replica` is to answer."""
    return {"extra_headers": {"X-data-parallel-rank": replica, "X-Hones-Task": expression}}


async def check_new(site: Site, client: Client, expression: str) -> None:
    """Ask for an expression that by now means next/vqa.safetensors, and check the answer."""
    answer = await ask(client, QUESTION, **steered(expression))
    assert answer.texts == [site.text(QUESTION, "new")]
    assert (answer.profile, answer.route) == (f"{expression} ({site.profiles['new'].short_digest})", "header")


def api_servers(site: Site) -> tuple[Path, list[int]]:
    """The folder in which the API servers agree, and their processes."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or os.getsid(int(process.name)) != site.server.process.pid:
            continue
        variables = dict(each.partition(b"=")[::2] for each in (process / "environ").read_bytes().split(b"\0"))
        if folder := variables.get(b"HONES_STATE_DIR"):
            state = Path(os.fsdecode(folder))
            return state, [json.loads((state / f"server-{index}").read_text())["pid"] for index in SERVERS]
    raise AssertionError("no API server has HONES_STATE_DIR")


async def test_each_server_steers_on_each_replica_and_metrics_count_once(site: Site) -> None:
    sent = list(itertools.product(SERVERS, REPLICAS, EXPRESSIONS))
    async with clients(site) as both:
        before, tokens = await scrape(site.server.url), await site.tokens()
        answers = [ask(both[index], QUESTION, **steered(expression, replica)) for index, replica, expression in sent]
        for (_, _, expression), answer in zip(sent, await asyncio.gather(*answers), strict=True):
            site.check(answer, QUESTION, expression, "header")
    await until(site.slots_used, 0)
    await until(site.tokens, tokens + len(sent) * NEW_TOKENS)
    after = await scrape(site.server.url)
    each = len(SERVERS) * len(REPLICAS)
    assert increase(before, after, "hones_requests_total") == {
        (label, "header"): each for label in ("vqa", "ocr", "none", "blend")
    }
    assert increase(before, after, "hones_tokens_total") == {
        (label,): each * NEW_TOKENS for label in ("vqa", "ocr", "none", "blend")
    }
    assert {key: value for key, value in after.items() if key[0] == "hones_profiles_loaded"} == {
        ("hones_profiles_loaded",): 3
    }


async def test_what_is_in_use_is_that_of_all_servers(site: Site) -> None:
    """Two requests with the profile of vqa, one with that of ocr; the former is in use in both."""
    async with clients(site) as both:
        with site.frozen():
            asked = [
                asyncio.create_task(ask(both[0], QUESTION, **steered("vqa"))),
                asyncio.create_task(ask(both[1], QUESTION, **steered("vqa"))),
                asyncio.create_task(ask(both[1], QUESTION, **steered("none"))),
            ]
            await until(site.admitted, 2)
            assert await site.slots_used() == 2
        await asyncio.gather(*asked)
    await until(site.admitted, 0)
    await until(site.slots_used, 0)


async def test_all_servers_know_what_one_was_told(site: Site) -> None:
    async with clients(site) as both:

        async def texts() -> set[tuple[str, str]]:
            """The answers of each server on each replica to a request for "vqa", with the routes."""
            sent = itertools.product(both, REPLICAS)
            answers = await asyncio.gather(*(ask(each, QUESTION, **steered("vqa", replica)) for each, replica in sent))
            return {(answer.texts[0], answer.route) for answer in answers}

        async def tell(index: int, method: str, path: str, body: object = None) -> None:
            response = await call(both[index], method, path, body)
            assert response.status_code == 200, response.text
            lists = [await listing(each) for each in both]
            assert [each.pop("api_server") for each in lists] == list(SERVERS)
            assert lists[0] == lists[1]

        assert await texts() == {(site.text(QUESTION, "vqa"), "header")}  # in the prefix caches from now on
        await tell(0, "POST", "/v1/hones/profiles", {"name": "vqa", "path": "next/vqa.safetensors"})
        assert await texts() == {(site.text(QUESTION, "new"), "header")}
        await tell(1, "POST", "/v1/hones/steering", {"enabled": False})
        assert await texts() == {(site.text(QUESTION, "none"), "off")}
        await tell(0, "POST", "/v1/hones/steering", {"enabled": True})
        await tell(1, "POST", "/v1/hones/profiles", {"name": "further", "path": "next/vqa.safetensors"})
        for each in both:
            await check_new(site, each, "vqa")
            await check_new(site, each, "further")
            assert "tiny:further" in [model.id for model in (await each.models.list()).data]
        assert (await scrape(site.server.url))[("hones_profiles_loaded",)] == 4
        await tell(0, "DELETE", "/v1/hones/profiles/further")
        for each in both:
            with pytest.raises(APIStatusError, match="no profile for the task 'further'"):
                await ask(each, QUESTION, **steered("further"))
        await tell(1, "POST", "/v1/hones/profiles", {"name": "vqa", "path": "vqa.safetensors"})
        assert await texts() == {(site.text(QUESTION, "vqa"), "header")}


async def test_the_canary_draws_alike(site: Site) -> None:
    async with clients(site) as both:
        routes = []
        for each in both:
            keys = ({"X-Hones-Key": str(key)} for key in range(12))
            answers = await asyncio.gather(*(ask(each, QUESTION, count=1, extra_headers=key) for key in keys))
            routes.append([answer.route for answer in answers])
    assert routes[0] == routes[1]
    assert set(routes[0]) == {"default", "canary"}


async def test_a_server_that_stands_still_is_named_and_steers_by_nothing_old(site: Site) -> None:
    _, processes = api_servers(site)
    async with clients(site) as both:
        os.kill(processes[1], signal.SIGSTOP)
        try:
            load = {"name": "vqa", "path": "next/vqa.safetensors"}
            response = await call(both[0], "POST", "/v1/hones/profiles", load)
            late = asyncio.create_task(ask(both[1], QUESTION, **steered("vqa")))
            await check_new(site, both[0], "vqa")
        finally:
            os.kill(processes[1], signal.SIGCONT)
        assert response.status_code == 503
        assert f"not confirmed by all in 10 s: API server 1 (process {processes[1]})" in response.text
        assert (await late).texts == [site.text(QUESTION, "new")]
        back = await call(both[1], "POST", "/v1/hones/profiles", {"name": "vqa", "path": "vqa.safetensors"})
        assert back.status_code == 200, back.text


async def test_without_the_state_nothing_is_steered(site: Site) -> None:
    folder, _ = api_servers(site)
    async with clients(site) as both:
        (folder / "state").rename(folder / "away")
        try:
            for each in both:
                for options in (
                    steered("vqa"),
                    steered("unheard-of"),
                    {"model": "tiny:vqa"},
                    {},
                ):  # the last by default
                    with pytest.raises(APIStatusError, match="does not know what steers now") as refused:
                        await ask(each, QUESTION, **options)
                    assert refused.value.status_code == 503
                site.check(await ask(each, QUESTION, **steered("none")), QUESTION, "none", "header")
                assert (await call(each, "GET", "/v1/hones/profiles")).status_code == 503
                change = await call(each, "POST", "/v1/hones/steering", {"enabled": False})
                assert change.status_code == 503, change.text
                assert [model.id for model in (await each.models.list()).data] == ["tiny"]
        finally:
            (folder / "away").rename(folder / "state")
        for each in both:
            site.check(await ask(each, QUESTION, **steered("vqa")), QUESTION, "vqa", "header")


async def end(site: Site, kill: Callable[[], None]) -> list[Any]:
    """Call `kill` while each API server has a request that runs; what came of these, once the server has ended."""
    folder, _ = api_servers(site)
    async with clients(site) as both:
        with suppress(ProcessLookupError), site.frozen():  # the engines will have gone
            asked = [asyncio.create_task(ask(each, QUESTION, **steered("vqa"))) for each in both]
            await until(site.admitted, 2)
            kill()
            ended = await asyncio.gather(*asked, return_exceptions=True)
    await asyncio.to_thread(site.server.process.wait)
    assert not folder.exists()
    return ended


async def test_vllm_ends_the_whole_server_when_one_api_server_dies(site: Site) -> None:
    """Ends the site's server, so it is the last test of it. The answers of the other API server are cut off, too."""
    _, processes = api_servers(site)
    ended = await end(site, lambda: os.kill(processes[0], signal.SIGKILL))
    assert all(isinstance(each, APIConnectionError | InternalServerError) for each in ended)
    assert site.server.process.returncode != 0


async def test_servers_before_one_engine_share_its_slots(unserved: Site, llama: Path) -> None:
    """Three slots for eight requests, so each API server may use one."""
    with served(unserved, llama, 1, "--max-profiles", "3") as site:
        async with clients(site) as both, clients(site) as others:
            asked = []
            with site.frozen():
                for index, (first, second) in enumerate((("vqa", "ocr"), ("ocr", "vqa"))):
                    asked.append(asyncio.create_task(ask(both[index], QUESTION, **steered(first))))
                    await until(site.slots_used, index + 1)
                    with pytest.raises(APIStatusError, match="1 other profiles are in use") as refused:
                        await ask(others[index], QUESTION, **steered(second))
                    assert refused.value.status_code == 429
            for answer, expression in zip(await asyncio.gather(*asked), ("vqa", "ocr"), strict=True):
                site.check(answer, QUESTION, expression, "header")
        ended = await end(site, site.server.process.terminate)
        assert all(
            isinstance(each, APIConnectionError | InternalServerError) for each in ended
        )  # despite --shutdown-timeout
        assert site.server.process.returncode == 0
