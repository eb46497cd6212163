"""Tokens per second of vLLM with hones-steer, as ratios to vLLM without it.

    .venv/bin/python benchmarks/vllm_serving.py --model-dir runs/benchmark --no-lora

(9 minutes on two quiet cores; with LoRA much longer) compares, eager and compiled, for decode and for prefill,

    absent           vLLM as it comes
    idle             the plugin is there, no request is steered
    1, 8, 64         every request is steered, by so many different profiles (request i by profile i mod 8)
    LoRA 1, LoRA 8   the same scaling of the same neurons as low-rank adapters on down_proj: one rank per neuron

The model is a Llama of SmolLM2-135M's shape with random weights; a profile scales 1% of the neurons of every layer.
An engine with the plugin and one without need processes of their own. They are all started first; then each runs one
round of a few seconds in turn, the others asleep, in an order that moves on by one with every repeat: a machine that
gets slower hits all alike. A round's ratio is to the `absent` round of the same repeat. The table gives the median
over the repeats and, in brackets, the smallest and the largest.

KV blocks lost: what the scale tables (or the adapters' buffers) take from a GPU's KV cache, were it of --kv-gib without
them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ALLOCATOR, SMOLLM2_135M, TINY, Shape, positive, random_llama, random_profile, ratios, task_name

if TYPE_CHECKING:
    from hones_steer import Profile

PROFILES = (1, 8, 64)
ADAPTERS = (1, 8)
PHASES = ("decode", "prefill")
MODES = ("eager", "compiled")
LORA = "vllm-lora"


@dataclass(frozen=True)
class Work:
    """One round: `requests` at once, of `prompt` tokens each, that ask for `new` tokens."""

    requests: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """The tokens that count: new tokens, or prompt tokens where only one new token is asked for."""
        return self.requests * (self.new if self.new > 1 else self.prompt)


REQUESTS = 64
WORKS = {"decode": Work(REQUESTS, 2, 24), "prefill": Work(REQUESTS, 32, 1)}
QUICK_WORKS = {"decode": Work(REQUESTS, 2, 4), "prefill": Work(REQUESTS, 16, 1)}


@dataclass(frozen=True)
class Variant:
    """One row's way of running vLLM: by the child process `child`, with so many different profiles or adapters."""

    child: str
    profiles: int | None = None

    @property
    def engine(self) -> str:
        """How rows call it."""
        return LORA if self.child == "lora" else "vllm"


ABSENT = Variant("absent")
VARIANTS = (
    ABSENT,
    *(Variant("plugin", count) for count in (0, *PROFILES)),
    *(Variant("lora", count) for count in ADAPTERS),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = _parser().parse_args(argv)
    os.environ.update(ALLOCATOR)
    with ExitStack() as stack:
        folder = args.model_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hones-benchmark-")))
        rows = measure(args, folder)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tokens per second of vLLM with hones-steer absent, idle and with 1, 8 and 64 profiles in flight.",
        epilog="The top of this file says how it is measured. Close everything else: the others' work is noise here.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of a table")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one repeat: does it run?")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="rounds per row (default: 5)")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="OMP_NUM_THREADS (default: 2)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="default: both")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="default: float32, which is twice as fast on a CPU without AMX",
    )
    parser.add_argument(
        "--prompt-tokens", type=positive, default=32, metavar="N", help="per request of prefill (default: 32)"
    )
    parser.add_argument("--no-lora", action="store_true", help="leave the comparison with LoRA out")
    parser.add_argument(
        "--kv-gib", type=float, default=4.0, metavar="GIB", help="KV cache that KV blocks are counted in (default: 4)"
    )
    parser.add_argument(
        "--model-dir",
        type=Path,
        metavar="DIR",
        help="keep the model, profiles, adapters and compiled code here for the next run (default: a temporary folder)",
    )
    return parser


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of all modes and phases."""
    from tqdm import tqdm

    inputs = folder / ("tiny" if args.quick else "smollm2-135m")
    write_inputs(inputs, TINY if args.quick else SMOLLM2_135M)
    works = QUICK_WORKS if args.quick else {**WORKS, "prefill": Work(REQUESTS, args.prompt_tokens, 1)}
    repeats = 1 if args.quick else args.repeats
    variants = [variant for variant in VARIANTS if not (args.no_lora and variant.child == "lora")]
    rows = []
    with tqdm(total=len(args.modes) * len(args.phases) * repeats * len(variants), unit="round", disable=None) as bar:
        for mode in args.modes:
            with engines({variant.child for variant in variants}, mode, args, inputs) as running:
                for phase in args.phases:
                    seconds = interleaved(running, variants, works[phase], repeats, bar)
                    rows += [
                        {"engine": variant.engine, "mode": mode, "phase": phase, "profiles": variant.profiles}
                        | speed(seconds[variant], seconds[ABSENT], works[phase].tokens)
                        | kv_blocks(running[variant.child].memory, args.kv_gib)
                        for variant in variants
                    ]
    return rows


def interleaved(
    running: Mapping[str, Engine], variants: Sequence[Variant], work: Work, repeats: int, bar: Any
) -> dict[Variant, list[float]]:
    """Seconds of each variant's rounds, one per repeat, after a round of each that does not count.

    Raises:
        SystemExit: steering changed no token, so nothing was measured.
    """
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    tokens = {variant: running[variant.child].round(work, variant.profiles).tokens for variant in variants}
    for variant in variants:
        if variant.profiles and tokens[variant] == tokens[ABSENT]:
            raise SystemExit(f"{variant.engine} with {variant.profiles} profiles wrote what vLLM alone writes")
    for repeat in range(repeats):
        for i in range(len(variants)):
            variant = variants[(i + repeat) % len(variants)]
            seconds[variant].append(running[variant.child].round(work, variant.profiles).seconds)
            bar.update()
    return seconds


def speed(seconds: Sequence[float], absent: Sequence[float], tokens: int) -> dict[str, Any]:
    """Ratios of the repeats, of which each has its own `absent` round, and tokens per second: medians."""
    return {**ratios(seconds, absent), "tokens_per_s": tokens / statistics.median(seconds)}


def kv_blocks(memory: Memory, gib: float) -> dict[str, int]:
    """KV blocks that fit into `gib` beside what steering takes, and how many fewer these are than without it."""
    budget = int(gib * 2**30)
    fit = (budget - memory.steering) // memory.kv_block
    return {"kv_blocks": fit, "kv_blocks_lost": budget // memory.kv_block - fit}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people, as Markdown."""
    lines = [
        "| mode | phase | profiles | tokens/s | ratio to absent | n | KV blocks lost |",
        "|---|---|---|---:|---|---:|---:|",
    ]
    for row in rows:
        count = {None: "absent", 0: "idle"}.get(row["profiles"], row["profiles"])
        name = f"LoRA {count}" if row["engine"] == LORA else count
        ratio = f"{row['ratio']:.3f} ({row['ratio_min']:.3f}–{row['ratio_max']:.3f})"
        lost = f"{row['kv_blocks_lost']} of {row['kv_blocks'] + row['kv_blocks_lost']:,}"
        speed = f"{row['tokens_per_s']:,.0f}"
        lines.append(f"| {row['mode']} | {row['phase']} | {name} | {speed} | {ratio} | {row['n']} | {lost} |")
    return "\n".join(lines)


# What the engines load ----------------------------------------------------------------------------


def write_inputs(folder: Path, shape: Shape) -> None:
    """A random model, profiles for it, and adapters that do what the first of the profiles do. Kept if there."""
    if (folder / "complete").exists():
        return
    import numpy as np

    from hones_steer import save_profile

    model = random_llama(shape)
    model.save_pretrained(folder / "model")
    (folder / "profiles").mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(max(PROFILES)):
        profile = random_profile(model, shape, task_name(i), random)
        save_profile(profile, folder / "profiles" / f"{profile.task}.safetensors")
        if i < max(ADAPTERS):
            write_adapter(folder / "adapters" / profile.task, profile, model)
    (folder / "complete").touch()


def write_adapter(folder: Path, profile: Profile, model: Any) -> None:
    """The LoRA that adds W[:, neurons] (scales - 1) z[neurons] to down_proj's output W z, in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for layer, (neurons, scales) in profile.layers.items():
        weight = model.model.layers[layer].mlp.down_proj.weight.detach()
        rows = torch.arange(len(neurons))
        columns = torch.tensor(neurons, dtype=torch.int64)
        picks = torch.zeros(len(neurons), weight.shape[1])
        picks[rows, columns] = 1
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{name}.lora_A.weight"] = picks
        tensors[f"{name}.lora_B.weight"] = weight[:, columns] * (torch.tensor(scales) - 1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = len(rows)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


# One engine in a process of its own ---------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes that an engine's tables or adapters take, and those of one KV block."""

    steering: int
    kv_block: int


@dataclass(frozen=True)
class Round:
    """How long it took, and what was written: a list of tokens per request."""

    seconds: float
    tokens: list[list[int]]


class Engine:
    """A child process with one engine, which works only while this process waits for it."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self._process = process
        self._connection = connection
        self.memory: Memory = self._answer()

    def round(self, work: Work, profiles: int | None) -> Round:
        """Run and time one round of `work`, its requests taking turns through `profiles` profiles."""
        self._connection.send((work, profiles))
        result: Round = self._answer()
        return result

    def stop(self) -> None:
        """End the process: it does so when nobody can ask it for more."""
        self._connection.close()
        self._process.join(timeout=60)
        self._process.kill()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(f"the process of {self._process.name} ended; what it said is above") from None


@contextmanager
def engines(names: Collection[str], mode: str, args: argparse.Namespace, inputs: Path) -> Iterator[dict[str, Engine]]:
    """The engines of these children, started one after the other and gone at the end of the block."""
    spawn = multiprocessing.get_context("spawn")
    running = {}
    try:
        for name in sorted(names):
            ours, theirs = spawn.Pipe()
            options = {"dtype": args.dtype, "enforce_eager": mode == "eager"}
            process = spawn.Process(target=serve, args=(theirs, name, inputs, args.threads, options), name=name)
            process.start()
            theirs.close()
            running[name] = Engine(process, ours)
        yield running
    finally:
        for engine in running.values():
            engine.stop()


def serve(connection: Connection, name: str, inputs: Path, threads: int, options: dict[str, Any]) -> None:
    """In the child: start an engine, send its `Memory`, then run the rounds that are asked for."""
    os.dup2(2, 1)  # vLLM prints; the parent's rows alone belong on stdout
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CACHE_ROOT=str(inputs / "vllm"),
        TORCHINDUCTOR_CACHE_DIR=str(inputs / "inductor"),
        OMP_NUM_THREADS=str(threads),
        VLLM_PLUGINS="hones" if name == "plugin" else "",
        HONES_PROFILES=str(inputs / "profiles") if name == "plugin" else "",
    )
    warnings.simplefilter("ignore")  # vLLM imports what torch has deprecated
    from vllm import LLM

    if name == "lora":
        options |= {"enable_lora": True, "max_loras": max(ADAPTERS), "max_lora_rank": 16}
    llm = LLM(
        str(inputs / "model"),
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_seqs=REQUESTS,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=2**29,
        **options,
    )
    connection.send(memory(llm))
    while True:
        try:
            work, profiles = connection.recv()
        except EOFError:
            return
        connection.send(run(llm, work, profiles, inputs / "adapters" if name == "lora" else None))


def run(llm: Any, work: Work, profiles: int | None, adapters: Path | None) -> Round:
    """One round in an engine."""
    import numpy as np
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    random = np.random.default_rng(1)
    size = llm.llm_engine.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": random.integers(10, size, work.prompt).tolist()} for _ in range(work.requests)]
    tasks = [i % profiles for i in range(work.requests)] if profiles else []
    extras = [{"hones_task": task_name(task)} for task in tasks] if tasks and not adapters else [None] * work.requests
    params = [
        SamplingParams(temperature=0, max_tokens=work.new, ignore_eos=True, detokenize=False, extra_args=extra)
        for extra in extras
    ]
    loras = (
        [LoRARequest(task_name(task), task + 1, str(adapters / task_name(task))) for task in tasks]
        if adapters and tasks
        else None
    )
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
    seconds = time.perf_counter() - start
    return Round(seconds, [list(output.outputs[0].token_ids) for output in outputs])


def memory(llm: Any) -> Memory:
    """The memory and time that steering takes in a loaded engine."""
    cache = llm.llm_engine.vllm_config.cache_config
    return Memory(llm.apply_model(steering_bytes)[0], cache.kv_cache_memory_bytes // cache.num_gpu_blocks)


def steering_bytes(model: Any) -> int:
    """Bytes of scale tables and of the slots of the tokens, or of adapters."""
    tensors = [
        buffer
        for name, buffer in model.named_buffers()
        if name.endswith(("hones_scaling.table", "hones_scaling.index"))
    ]
    for module in model.modules():
        for name in ("lora_a_stacked", "lora_b_stacked"):
            tensors += getattr(module, name, ())
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    sys.exit(main())
