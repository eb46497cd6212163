"""Thousands of mixed requests against a data-parallel vLLM server that changes meanwhile: is any answer wrong?

    .venv/bin/python benchmarks/soak.py

(10,000 answers; about ten minutes on two cores). A small Llama with random weights is served by `hones serve`
with two replicas of the engine. Clients, each a process of its own with several requests at once, ask for tasks,
blends, strengths and nothing steered, whole and streamed; some streams are left after the first piece, some requests
before they are answered. All the while a profile is replaced by another version and back, the kill switch is thrown
and taken back, and client processes are killed and replaced.

Every answer is compared, token by token, with that of transformers steered by `hones_steer.steer`, of the contents that
its X-Hones-Profile names; and these must be contents that were in force at some time between the request's departure
and its answer's head. So an answer half of the old version and half of the new is wrong, and so is an old one after the
replacement had been confirmed. In the end, no profile may be in use and no request in flight.

Exits with 1 if anything was wrong, lost or left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common import Shape, positive, random_llama, random_profile, write_byte_tokenizer

SHAPE = Shape(layers=2, hidden=64, ffn=256, heads=2, kv_heads=1, vocabulary=512)
STEERED_NEURONS = 64  # of a layer: a quarter, so that most answers change
TASKS = ("vqa", "ocr", "cap")
REPLACED = "vqa"
VERSIONS = ("old", "new")
EXPRESSIONS = (
    None,
    "none",
    "vqa",
    "ocr",
    "cap",
    "vqa@0.5",
    "vqa@-1",
    "ocr@1.5",
    "vqa@0.5+ocr",
    "vqa@-1+cap@2",
    "ocr+cap",
)
NEW_TOKENS = 16
STEMS, PROMPTS = 3, 24
AT_ONCE = 4
START_SECONDS, SETTLE_SECONDS = 600, 60

Way = Literal["whole", "streamed", "left", "gone"]
WAYS: Mapping[Way, int] = {"whole": 45, "streamed": 35, "left": 12, "gone": 8}
"""How requests are sent, in percent: `left` reads the first piece of a stream, `gone` waits .1 seconds at most."""


class Asked(NamedTuple):
    """A request: prompt number, expression, and how many tokens are wanted."""

    prompt: int
    expression: str | None
    count: int


class Answer(NamedTuple):
    """One request as its client saw it; times are those of `time.monotonic`, one clock for all processes."""

    asked: Asked
    way: Way
    sent: float
    begun: float
    """When the head of the answer was there."""
    status: int
    profile: str
    route: str
    tokens: tuple[int, ...]
    """All of them; of a stream that was left, the first."""
    error: str


class Expected(NamedTuple):
    """The header X-Hones-Profile and the tokens of an answer."""

    profile: str
    tokens: tuple[int, ...]


@dataclass
class Timeline:
    """States with their times: changes, each with the times before it was asked for and after it was confirmed."""

    first: str
    changes: list[tuple[float, float, str]] = field(default_factory=list)

    def possible(self, start: float, end: float) -> set[str]:
        """Everything that may have been in force at some time between the two."""
        begins = [(float("-inf"), self.first), *((asked, value) for asked, _, value in self.changes)]
        ends = [*(confirmed for _, confirmed, _ in self.changes), float("inf")]
        return {value for (begin, value), last in zip(begins, ends, strict=True) if begin <= end and start <= last}

    @property
    def now(self) -> str:
        """The state after the last change."""
        return self.changes[-1][2] if self.changes else self.first


# ------------------------------------------------------------------------------------------------- clients


def client(url: str, prompts: Sequence[Sequence[int]], seed: int, channel: Connection) -> None:
    """Ask until told to stop, or killed; every request's outcome goes through the channel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    asyncio.run(_ask_on(url, prompts, seed, channel))


async def _ask_on(url: str, prompts: Sequence[Sequence[int]], seed: int, channel: Connection) -> None:
    import httpx

    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=AT_ONCE)) as http:

        async def one_after_the_other() -> None:
            while not channel.poll():  # the only message is that to stop
                asked = Asked(rng.randrange(len(prompts)), rng.choice(EXPRESSIONS), rng.randint(2, NEW_TOKENS))
                (way,) = rng.choices(list(WAYS), list(WAYS.values()))
                channel.send(await _ask(http, prompts[asked.prompt], asked, way, rng.uniform(0, 0.1)))

        await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    channel.recv()  # a channel that is closed with something unread loses what was sent


async def _ask(http: Any, prompt: Sequence[int], asked: Asked, way: Way, patience: float) -> Answer:
    import httpx

    body: dict[str, Any] = {"model": "tiny", "prompt": list(prompt), "max_tokens": asked.count, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "stream": way in ("streamed", "left")}
    headers = {} if asked.expression is None else {"X-Hones-Task": asked.expression}
    sent = time.monotonic()
    try:
        async with (
            asyncio.timeout(patience if way == "gone" else None),
            http.stream("POST", "/v1/completions", json=body, headers=headers) as response,
        ):
            begun = time.monotonic()
            told = [response.headers.get(f"x-hones-{name}", "") for name in ("profile", "route")]
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Answer(asked, way, sent, begun, response.status_code, *told, (), text)
            if not body["stream"]:
                tokens = json.loads(await response.aread())["choices"][0]["token_ids"]
                return Answer(asked, way, sent, begun, 200, *told, tuple(tokens), "")
            tokens = []
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        tokens += choice["token_ids"] or []
                if tokens and way == "left":
                    break
            return Answer(asked, way, sent, begun, 200, *told, tuple(tokens), "")
    except TimeoutError:
        return Answer(asked, way, sent, sent, 0, "", "", (), "")
    except httpx.HTTPError as error:
        return Answer(asked, way, sent, time.monotonic(), 0, "", "", (), f"{type(error).__name__}: {error}")


class Clients:
    """Processes that ask; `kill` ends one in the middle of its requests and starts another."""

    def __init__(self, url: str, prompts: Sequence[Sequence[int]], count: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._url, self._prompts, self._seed = url, prompts, 0
        self._running: dict[Connection, Any] = {}
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=client, args=(self._url, self._prompts, self._seed, theirs), daemon=True)
        process.start()
        theirs.close()
        self._running[ours] = process
        self._seed += 1

    def answers(self, seconds: float) -> Iterator[Answer]:
        """Yield what comes in, after waiting for at most so long."""
        for channel in wait(list(self._running), seconds):
            assert isinstance(channel, Connection)
            try:
                while channel.poll():
                    yield channel.recv()
            except (EOFError, OSError):
                raise SystemExit("error: a client ended by itself; see above") from None

    def kill(self, rng: random.Random) -> None:
        """Kill one of them, whose sockets the kernel closes, and start another."""
        channel = rng.choice(list(self._running))
        process = self._running.pop(channel)
        process.kill()
        process.join()
        channel.close()
        self._start()

    def stop(self) -> list[Answer]:
        """Let all finish what they have asked; the last answers."""
        last: list[Answer] = []
        for channel, process in self._running.items():
            channel.send("stop")
            with contextlib.suppress(EOFError):
                while True:
                    last.append(channel.recv())
            process.join()
            channel.close()
        self._running.clear()
        return last


# -------------------------------------------------------------------------------------------------- server


@contextlib.contextmanager
def server(
    model: Path, profiles: Path, replicas: int, options: Sequence[str], log: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run `hones serve` until the block ends: its URL and process."""
    import httpx

    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hones_steer", "serve", str(model), "--engine", "vllm"]
    command += ["--profiles", str(profiles), "--allow-profile-updates", "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--max-num-seqs", "8", "--block-size", "32"]
    command += [] if replicas == 1 else ["--data-parallel-size", str(replicas)]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # On a busy machine the server closes a connection as idle just as a client uses it again: clients retry that, ours
    # counts it as an answer that was lost.
    idle = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600"}
    env = {**quiet, **idle, "OMP_NUM_THREADS": "1", **os.environ}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *options], env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text("utf-8", errors="replace")[-3000:]
                raise SystemExit(f"error: the server did not start (exit code {process.poll()}):\n{tail}")
            time.sleep(0.5)
        yield url, process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def gauge(url: str, *names: str) -> float:
    """The sum of some metrics' samples."""
    import httpx

    lines = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))


def memory_mib(pid: int) -> float:
    """Memory of the server's processes, shared pages counted once for each."""
    import psutil

    root = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (root, *root.children(recursive=True))) / 2**20


# ------------------------------------------------------------------------------------------------- the run


def prepare(folder: Path) -> tuple[list[list[int]], dict[tuple[int, str | None, str], Expected]]:
    """Write a model and profiles; the prompts, and what is expected of (prompt, expression, version)."""
    import numpy as np
    import torch

    from hones_steer import save_profile, steer
    from hones_steer.store import combine, parse_expression

    model = random_llama(SHAPE)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    write_byte_tokenizer(SHAPE, folder / "model")
    rng = np.random.default_rng(0)
    (folder / "profiles" / "versions").mkdir(parents=True)
    profiles = {task: random_profile(model, SHAPE, task, rng, STEERED_NEURONS) for task in TASKS}
    for task, profile in profiles.items():
        save_profile(profile, folder / "profiles" / f"{task}.safetensors")
    versions = {"old": profiles[REPLACED], "new": random_profile(model, SHAPE, REPLACED, rng, STEERED_NEURONS)}
    for version, profile in versions.items():
        save_profile(profile, folder / "profiles" / "versions" / f"{version}.safetensors")

    stems = rng.integers(32, 127, (STEMS, 64)).tolist()  # longer than a block, so that requests share cached ones
    ends = [rng.integers(32, 127, 3 + i).tolist() for i in range(PROMPTS)]
    prompts = [(stems[i % STEMS] if i % 4 else []) + end for i, end in enumerate(ends)]
    expected = {}
    for version, replaced in versions.items():
        known = {**profiles, REPLACED: replaced}
        with steer(model, known) as steering, torch.no_grad():
            for expression in EXPRESSIONS:
                profile = None if expression is None else combine(parse_expression(expression), known.__getitem__)
                header = "none" if profile is None else f"{expression} ({profile.short_digest})"
                for i, prompt in enumerate(prompts):
                    ids = torch.tensor([prompt])
                    with steering.task(expression or "none"):
                        whole = model.generate(
                            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
                        )
                    expected[i, expression, version] = Expected(header, tuple(whole[0, len(prompt) :].tolist()))
    return prompts, expected


class Judge:
    """Compares answers with what is expected at their time, and counts."""

    def __init__(self, expected: Mapping[tuple[int, str | None, str], Expected]) -> None:
        self._expected = expected
        self.version, self.switch = Timeline("old"), Timeline("on")
        self.counts = Counter[str]()
        self.complaints: list[str] = []

    def take(self, answer: Answer) -> None:
        """Count an answer; what is wrong with it is kept."""
        if answer.way == "gone":
            if answer.status == 0 and not answer.error:
                self.counts["gone"] += 1
                return
            answer = answer._replace(way="whole")  # it was faster than the client's patience
        self.counts["answered"] += 1
        self.counts[answer.way] += 1
        if (reason := self._reason(answer)) is not None:
            self.counts["wrong"] += 1
            self.complaints.append(f"{reason}: {answer}")

    def _reason(self, answer: Answer) -> str | None:
        if answer.status != 200:
            return f"no answer, status {answer.status}"
        prompt, expression, count = answer.asked
        if answer.way != "left" and len(answer.tokens) != count:
            return f"{len(answer.tokens)} tokens instead of {count}"
        fitting = []
        for version in VERSIONS:
            for switch in ("on", "off"):
                off = switch == "off"
                right = self._expected[prompt, None if off else expression, version]
                if (answer.route == "off") != off:
                    continue
                if answer.profile == right.profile and answer.tokens == right.tokens[: len(answer.tokens)]:
                    fitting.append((version, switch))
        if not fitting:
            return "other tokens than those of any contents that it names"
        versions = self.version.possible(answer.sent, answer.begun)
        switches = self.switch.possible(answer.sent, answer.begun)
        if not any(version in versions and switch in switches for version, switch in fitting):
            return f"steered by {fitting}, but only {sorted(versions)} and {sorted(switches)} were in force"
        self.counts["changed"] += self._expected[prompt, None, "old"].tokens[: len(answer.tokens)] != answer.tokens
        return None


def change(url: str, path: str, body: Mapping[str, Any], timeline: Timeline, value: str) -> None:
    """Change the server by HTTP, and note when."""
    import httpx

    asked = time.monotonic()
    response = httpx.post(f"{url}{path}", json=dict(body), timeout=300)
    if response.status_code != 200:
        raise SystemExit(f"error: {path} answered {response.status_code}: {response.text}")
    timeline.changes.append((asked, time.monotonic(), value))


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything; the counts."""
    from tqdm import tqdm

    prompts, expected = prepare(folder)
    rng = random.Random(args.seed)
    judge, kills = Judge(expected), 0
    log = folder / "log"
    with server(folder / "model", folder / "profiles", args.replicas, args.options, log) as (url, process):
        clients = Clients(url, prompts, args.clients)
        started = time.monotonic()
        next_change = started + args.every
        early = 0.0
        with tqdm(total=args.requests, unit="answer", disable=None) as bar:
            while judge.counts["answered"] < args.requests:
                for answer in clients.answers(0.2):
                    judge.take(answer)
                bar.n = judge.counts["answered"]
                bar.refresh()
                if process.poll() is not None:
                    tail = log.read_text("utf-8", errors="replace")[-3000:]
                    raise SystemExit(f"error: the server has ended (exit code {process.returncode}):\n{tail}")
                if not early and judge.counts["answered"] >= args.requests // 10:
                    early = memory_mib(process.pid)
                if time.monotonic() < next_change:
                    continue
                match rng.choice(("replace", "replace", "switch", "kill")):
                    case "replace":
                        value = "new" if judge.version.now == "old" else "old"
                        body = {"name": REPLACED, "path": f"versions/{value}.safetensors"}
                        change(url, "/v1/hones/profiles", body, judge.version, value)
                    case "switch":
                        value = "off" if judge.switch.now == "on" else "on"
                        change(url, "/v1/hones/steering", {"enabled": value == "on"}, judge.switch, value)
                    case _:
                        clients.kill(rng)
                        kills += 1
                next_change = time.monotonic() + args.every
        for answer in clients.stop():
            judge.take(answer)
        seconds = time.monotonic() - started
        left = settled(url)
        grown = memory_mib(process.pid) - early
    counts = judge.counts
    return {
        "answers": counts["answered"],
        "wrong": counts["wrong"],
        "complaints": judge.complaints[:10],
        "steered to other tokens": counts["changed"],
        "whole": counts["whole"],
        "streamed": counts["streamed"],
        "streams left": counts["left"],
        "requests left before an answer": counts["gone"],
        "clients killed": kills,
        "profiles replaced": len(judge.version.changes),
        "switched off or on": len(judge.switch.changes),
        **left,
        "memory grown after the first tenth, MiB": round(grown),
        "replicas": args.replicas,
        "seconds": round(seconds),
    }


def settled(url: str) -> dict[str, float]:
    """Wait until nothing is in use, and return what still is after a minute."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        left = {
            "slots in use": gauge(url, "hones_slots_used"),
            "requests in flight": gauge(url, "hones_requests_in_flight"),
            "requests in the engine": gauge(url, "vllm:num_requests_running", "vllm:num_requests_waiting{"),
        }
        if not any(left.values()) or time.monotonic() > end:
            return left
        time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print."""
    args = _parser().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="hones-soak-") as folder:
            result = run(args, Path(folder))
    except KeyboardInterrupt:
        print("soak: stopped before its end; nothing was judged", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print("\n".join(f"{name}: {value}" for name, value in result.items() if name != "complaints"))
        print(*result["complaints"], sep="\n", end="")
    bad = result["wrong"] + result["slots in use"] + result["requests in flight"] + result["requests in the engine"]
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Mixed requests against a vLLM server whose profiles change; every answer is checked.",
        epilog="The top of this file says what is sent and when an answer counts as wrong.",
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--requests", type=positive, default=10_000, metavar="N", help="answers (default: 10000)")
    parser.add_argument("--replicas", type=positive, default=2, metavar="N", help="of the engine (default: 2)")
    parser.add_argument("--clients", type=positive, default=4, metavar="N", help="processes that ask (default: 4)")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between changes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: 0)")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="further options of the server, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
