"""Tokens per second of `hones serve --engine transformers` with one client and with several, beside plain `generate`.

    .venv/bin/python benchmarks/hf_serving.py

(some minutes on one free core). The model is a Llama of SmolLM2-135M's shape with random weights, float32;
every request asks for `--new` tokens after `--prompt`. The application is called in this process, without sockets, by
one client and by several; each sends its next request when its last one is answered. Rows:

    generate       no server: `model.generate` by itself, of one prompt and of as many as there are clients
    pages          the server as it comes: continuous batching, nothing steered
    pages, N       the same, each client's requests steered by a profile of its own
    batches, N     the server without a paged cache (`--kv-cache-gib 0`), steered likewise

A round runs all rows in turn, so that a slow minute of the machine hits all alike; a ratio is of two rows of the same
round. *over one*: tokens per second with all clients over those of the same row with one client; *over generate*: over
those of `generate` with as many prompts. Both by the process's CPU time and, in brackets, by the clock on the wall.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import SMOLLM2_135M, TINY, Shape, positive, random_llama, random_profile, task_name, write_byte_tokenizer

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the process's time and of the clock's."""

    cpu: float
    wall: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="hones-benchmark-") as folder:
        rows = measure(args, Path(folder))
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tokens per second of the transformers engine with one client and with several.",
        epilog="The top of this file says how it is measured. Close everything else: the others' work is noise here.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of a table")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one repeat: does it run?")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="PyTorch's threads (default: 1)")
    parser.add_argument("--clients", type=positive, default=8, metavar="N", help="default: 8")
    parser.add_argument("--requests", type=positive, default=2, metavar="N", help="of a client in a round (default: 2)")
    parser.add_argument("--prompt", type=positive, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    parser.add_argument("--new", type=positive, default=32, metavar="N", help="tokens of an answer (default: 32)")
    return parser


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows, each with the medians of its ratios, the smallest and the largest."""
    import torch

    torch.set_num_threads(args.threads)
    write_model(TINY if args.quick else SMOLLM2_135M, folder, args.clients)
    rounds = asyncio.run(measure_rounds(args, folder))
    plain = [found["generate"] for found in rounds]
    rows = []
    for name in rounds[0]:
        several = [found[name][1] for found in rounds]
        one = [found[name][0] for found in rounds]
        row: dict[str, Any] = {"row": name, "n": len(rounds), "clients": args.clients}
        row["tokens_per_cpu_second"] = statistics.median(speed.cpu for speed in several)
        row["over_one"] = _spread(several, one)
        row["over_generate"] = _spread(several, [speeds[1] for speeds in plain])
        rows.append(row)
    return rows


def _spread(speeds: Sequence[Speed], others: Sequence[Speed]) -> dict[str, list[float]]:
    """By each clock: the median of the ratios, the smallest and the largest."""
    cpu = [speed.cpu / other.cpu for speed, other in zip(speeds, others, strict=True)]
    wall = [speed.wall / other.wall for speed, other in zip(speeds, others, strict=True)]
    return {name: [statistics.median(found), min(found), max(found)] for name, found in (("cpu", cpu), ("wall", wall))}


def write_model(shape: Shape, folder: Path, profiles: int) -> None:
    """Write a random model without end tokens, a tokenizer of single bytes, and as many profiles."""
    import numpy as np

    from hones_steer import save_profile

    model = random_llama(shape)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    write_byte_tokenizer(shape, folder / "model")
    (folder / "profiles").mkdir()
    random = np.random.default_rng(0)
    for i in range(profiles):
        profile = random_profile(model, shape, task_name(i), random)
        save_profile(profile, folder / "profiles" / f"{task_name(i)}.safetensors")


async def measure_rounds(args: argparse.Namespace, folder: Path) -> list[dict[str, tuple[Speed, Speed]]]:
    """For each round and row, the speed with one client (or prompt) and with all."""
    import httpx
    from hones_serving.settings import Settings
    from hones_serving.transformers_server.app import build_app, pinned
    from prometheus_client import CollectorRegistry
    from transformers import AutoModelForCausalLM

    def client(cache_gib: float) -> httpx.AsyncClient:
        app = build_app(
            Settings(folder / "profiles"),
            pinned(str(folder / "model"), device="cpu"),
            ["m"],
            collector=CollectorRegistry(),
            most=args.clients,
            cache_gib=cache_gib,
        )
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=None)

    plain = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    rounds = []
    async with client(0.25) as pages, client(0) as batches:
        for repeat in range(-1, 1 if args.quick else args.repeats):
            found = {
                "generate": (generate(plain, 1, args), generate(plain, args.clients, args)),
                "pages": (await ask(pages, 1, False, args), await ask(pages, args.clients, False, args)),
                f"pages, {args.clients}": (
                    await ask(pages, 1, True, args),
                    await ask(pages, args.clients, True, args),
                ),
                f"batches, {args.clients}": (
                    await ask(batches, 1, True, args),
                    await ask(batches, args.clients, True, args),
                ),
            }
            if repeat >= 0:  # the first is for whatever is made once
                rounds.append(found)
    return rounds


def generate(model: Any, prompts: int, args: argparse.Namespace) -> Speed:
    """Run plain `generate` as often as a client asks."""
    import torch

    ids = torch.randint(32, 127, (prompts, args.prompt), generator=torch.Generator().manual_seed(0))
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(args.requests):
        options = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return _speed(prompts * args.requests * args.new, cpu, wall)


async def ask(server: httpx.AsyncClient, clients: int, steered: bool, args: argparse.Namespace) -> Speed:
    """Have several clients ask a server, each one request after the other."""

    async def client(number: int) -> int:
        tokens = 0
        for i in range(args.requests):
            body = {"model": f"m:{task_name(number)}" if steered else "m", "max_tokens": args.new, "temperature": 0}
            prompt = "".join(chr(97 + (number + i + j * 7) % 26) for j in range(args.prompt))
            answer = await server.post("/v1/completions", json={**body, "prompt": prompt})
            tokens += answer.raise_for_status().json()["usage"]["completion_tokens"]
        return tokens

    cpu, wall = time.process_time(), time.perf_counter()
    tokens = await asyncio.gather(*(client(number) for number in range(clients)))
    return _speed(sum(tokens), cpu, wall)


def _speed(tokens: int, cpu: float, wall: float) -> Speed:
    return Speed(tokens / (time.process_time() - cpu), tokens / (time.perf_counter() - wall))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table in Markdown."""

    def cell(spread: dict[str, list[float]]) -> str:
        median, smallest, largest = spread["cpu"]
        return f"{median:.2f} ({smallest:.2f}–{largest:.2f}) [{spread['wall'][0]:.2f}]"

    lines = ["| row | over one | over generate | tokens per CPU second | n |", "|---|---|---|---:|---:|"]
    for row in rows:
        speed = f"{row['tokens_per_cpu_second']:.0f}"
        lines.append(
            f"| {row['row']} | {cell(row['over_one'])} | {cell(row['over_generate'])} | {speed} | {row['n']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
