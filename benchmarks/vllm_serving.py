"""Tokens per second of vLLM with hones-steer, as ratios to vLLM without it.

    .venv/bin/python benchmarks/vllm_serving.py --model-dir runs/benchmark

(9 minutes on two idle cores; `--minutes` gives it more) compares, for decode and for prefill,

    absent    vLLM as it comes
    again     the same once more: how far from 1 a ratio gets by chance
    idle      the plugin is there, no request is steered
    1, 8, 64  every request is steered, by so many different profiles (request i by profile i mod 8)

The model is a Llama of SmolLM2-135M's shape with random weights; a profile scales 1% of the neurons of every layer.

All rows of a runner and mode come from one engine in one process, in the same memory: between two rounds hones-steer
is taken off and put on again (`Plugin`). Compiled, the engine keeps two compiled models on the same weights, one that
vLLM compiled with the plugin and one that it compiled after it had been taken off; CUDA graphs, which have no such
seam, are off. Before anything counts, a round of each row must have run hones-steer's code, or none of it at all, and
steering must have changed what is written.

Rounds of a second or two take turns in an order that moves on by one with every repeat, as many as there is time for.
A ratio is to the `absent` round of the same repeat, once by wall time, which is what a user waits for and wants idle
cores, and once by the process's CPU time, which stands still while others have the core. CPU time counts work that two
threads share twice, and so weighs what one thread does alone less. Given are the median and its 95% interval, by the
ranks of the rounds and whatever their distribution; a row with an interval wider than ±0.02 by CPU time is marked, and
decides nothing.

Runners: V1, and V2 as well where Triton is installed. On a CPU V2 runs only by Triton's interpreter
(.venv/triton-interpreter, installed for the tests), where a step takes so long for reasons of its own that its ratios
say nothing. `--runners V2` runs it there all the same, eager: `--rows idle 64 --phases decode` takes minutes.

With `--lora`, vLLM is started with LoRA, `absent` is vLLM with LoRA that nobody uses, and two more rows,

    LoRA 1, LoRA 8  the same scaling of the same neurons as low-rank adapters on down_proj: one rank per neuron

KV blocks lost: what the scale tables (or the adapters' buffers) take from a GPU's KV cache, were it of --kv-gib without
them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    ALLOCATOR,
    SMOLLM2_135M,
    TINY,
    Shape,
    in_turn,
    median_interval,
    positive,
    random_llama,
    random_profile,
    task_name,
)

if TYPE_CHECKING:
    from hones_steer import Profile

PROFILES = (1, 8, 64)
ADAPTERS = (1, 8)
PHASES = ("decode", "prefill")
MODES = ("eager", "compiled")
RUNNERS = ("V1", "V2")
TRITON = Path(sys.prefix, "triton-interpreter")  # see tests/serving/install_vllm.py
WIDE = 0.02  # a row whose interval is wider to either side decides nothing
REQUESTS = 64


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


@dataclass(frozen=True)
class Variant:
    """One row's way of running vLLM; `profiles` is the number of different profiles, or adapters, of its requests."""

    name: str
    steered: bool = False
    """Whether hones-steer is there."""
    profiles: int = 0

    @property
    def adapters(self) -> bool:
        """Whether LoRA does what the profiles would."""
        return not self.steered and self.profiles > 0


ABSENT = Variant("absent")
VARIANTS = (
    ABSENT,
    Variant("again"),
    Variant("idle", steered=True),
    *(Variant(str(count), True, count) for count in PROFILES),
)
LORA = tuple(Variant(f"LoRA {count}", False, count) for count in ADAPTERS)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.new_tokens < 2:
        parser.error("--new-tokens: decode begins with the second")
    if not args.lora and any(name.startswith("LoRA") for name in args.rows or ()):
        parser.error("--rows: those of LoRA need --lora")
    if args.engine:
        with _stdout_for_rows_alone() as out:
            print(json.dumps(measure(args, *args.engine)), file=out, flush=True)
        return 0
    with ExitStack() as stack:
        folder = args.model_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hones-benchmark-")))
        rows = measure_all(args, folder)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tokens per second of vLLM with hones-steer absent, idle and with 1, 8 and 64 profiles in flight.",
        epilog="The top of this file says how it is measured. Close everything else: the others' work is noise here.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of a table")
    parser.add_argument("--quick", action="store_true", help="a tiny model and as few rounds as can be: does it run?")
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="N", help="for everything, engines' starts included (default: 9)"
    )
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="OMP_NUM_THREADS (default: 2)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, help="default: V1, and V2 if Triton is installed")
    parser.add_argument("--rows", nargs="+", choices=[v.name for v in VARIANTS + LORA], help="default: all")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="default: both")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="default: float32, which is twice as fast on a CPU without AMX",
    )
    parser.add_argument(
        "--prompt-tokens", type=positive, default=16, metavar="N", help="per request of prefill (default: 16)"
    )
    parser.add_argument(
        "--new-tokens", type=positive, default=4, metavar="N", help="per request of decode (default: 4)"
    )
    parser.add_argument("--lora", action="store_true", help="start vLLM with LoRA and compare with it (much longer)")
    parser.add_argument(
        "--kv-gib", type=float, default=4.0, metavar="GIB", help="KV cache that KV blocks are counted in (default: 4)"
    )
    parser.add_argument(
        "--model-dir",
        type=Path,
        metavar="DIR",
        help="keep the model, profiles, adapters and compiled code here for the next run (default: a temporary folder)",
    )
    parser.add_argument("--engine", nargs=2, metavar=("MODE", "RUNNER"), help=argparse.SUPPRESS)
    return parser


# Engines, each in a process of its own and one after the other --------------------------------------


def measure_all(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of all engines.

    Raises:
        SystemExit: nothing of what was asked for can run here, or an engine's process failed.
    """
    interpreted = importlib.util.find_spec("triton") is None
    runners = args.runners or (["V1"] if interpreted else RUNNERS)
    engines = [(mode, runner) for runner in runners for mode in args.modes]
    if interpreted:  # which compiles nothing
        engines = [(mode, runner) for mode, runner in engines if (mode, runner) != ("compiled", "V2")]
    if not engines:
        raise SystemExit("the V2 runner needs Triton to be compiled, which is not installed; leave out --modes")
    inputs = folder / ("tiny" if args.quick else "smollm2-135m")
    write_inputs(inputs, TINY if args.quick else SMOLLM2_135M)
    deadline = time.monotonic() + 60 * args.minutes
    rows = []
    for number, (mode, runner) in enumerate(engines):
        minutes = max(0.0, deadline - time.monotonic()) / 60 / (len(engines) - number)
        command = [sys.executable, __file__, *_passed_on(args), "--engine", mode, runner, "--model-dir", str(inputs)]
        done = subprocess.run(
            [*command, "--minutes", str(minutes)],
            env={**os.environ, **environment(args, inputs, runner, interpreted)},
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"the process of vLLM {mode}, {runner}, ended; what it said is above")
        rows += json.loads(done.stdout)
    return rows


def _passed_on(args: argparse.Namespace) -> list[str]:
    """The arguments that an engine's process needs as well."""
    numbers = {"--prompt-tokens": args.prompt_tokens, "--new-tokens": args.new_tokens}
    numbers |= {"--kv-gib": args.kv_gib, "--dtype": args.dtype}
    flags = {"--quick": args.quick, "--lora": args.lora}
    return [
        *(name for name, given in flags.items() if given),
        *(part for name, value in numbers.items() for part in (name, str(value))),
        *("--phases", *args.phases),
        *(("--rows", *args.rows) if args.rows else ()),
    ]


def environment(args: argparse.Namespace, inputs: Path, runner: str, interpreted: bool) -> dict[str, str]:
    """Variables of an engine's process, some of which are read when it starts."""
    variables = {
        **ALLOCATOR,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0",
        "VLLM_CACHE_ROOT": str(inputs / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(inputs / "inductor"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(args.threads),
        # A thread that waits for work would count as CPU time. (Each is one OpenMP's way to say so.)
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "VLLM_PLUGINS": "hones",
        "HONES_PROFILES": str(inputs / "profiles"),
    }
    if runner == "V2" and interpreted:
        paths = [str(TRITON), os.environ.get("PYTHONPATH", "")]
        variables |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TORCH_COMPILE_DISABLE": "1"}
    return variables


@contextmanager
def _stdout_for_rows_alone() -> Iterator[Any]:
    """Within the block, what is printed goes to stderr (vLLM prints), and what is written to the result to stdout."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


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


# One engine ---------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, mode: str, runner: str) -> list[dict[str, Any]]:
    """The rows of one engine, in this process; `args.model_dir` is what `write_inputs` wrote."""
    deadline = time.monotonic() + 60 * args.minutes
    engine = Engine(args, mode)
    variants = [
        v for v in (*VARIANTS, *(LORA if args.lora else ())) if v == ABSENT or v.name in (args.rows or [v.name])
    ]
    work = works(args)
    engine.check(variants)
    both = [(phase, variant) for phase in args.phases for variant in variants]
    for phase, variant in both:  # what is made at first need is made now
        engine.round(work[phase], variant)
    seconds = 0.0 if args.quick else deadline - time.monotonic()
    rounds = in_turn(both, lambda which: engine.round(work[which[0]], which[1]), seconds)
    rows = [
        {"runner": runner, "mode": mode, "phase": phase, "name": variant.name, "profiles": variant.profiles}
        | compared(rounds[phase, variant], rounds[phase, ABSENT], work[phase])
        | kv_blocks(engine.memory(variant), engine.kv_block, args.kv_gib)
        for phase, variant in both
    ]
    print(table(rows), file=sys.stderr, flush=True)
    return rows


def works(args: argparse.Namespace) -> dict[str, Work]:
    """One round of each phase."""
    if args.quick:
        return {"decode": Work(REQUESTS, 2, 4), "prefill": Work(REQUESTS, 16, 1)}
    return {"decode": Work(REQUESTS, 2, args.new_tokens), "prefill": Work(REQUESTS, args.prompt_tokens, 1)}


@dataclass(frozen=True)
class Round:
    """How long one took, and what was written: a list of tokens per request."""

    wall: float
    cpu: float
    tokens: list[list[int]]


class Engine:
    """A vLLM engine with hones-steer, which can be taken off."""

    def __init__(self, args: argparse.Namespace, mode: str) -> None:
        warnings.simplefilter("ignore")  # vLLM imports what torch has deprecated
        from vllm import LLM

        self._adapters = args.model_dir / "adapters"
        lora = {"enable_lora": True, "max_loras": max(ADAPTERS), "max_lora_rank": 16} if args.lora else {}
        self.llm = LLM(
            str(args.model_dir / "model"),
            dtype=args.dtype,
            enforce_eager=mode == "eager",
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            enable_prefix_caching=False,
            max_model_len=1024,
            max_num_seqs=REQUESTS,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=2**29,
            compilation_config={"cudagraph_mode": "NONE"},  # a captured graph could not be taken off
            **lora,
        )
        cache = self.llm.llm_engine.vllm_config.cache_config
        self.kv_block: int = cache.kv_cache_memory_bytes // cache.num_gpu_blocks
        self.plugin: Plugin = self.llm.collective_rpc(Plugin, args=(mode == "compiled",))[0]

    def round(self, work: Work, variant: Variant) -> Round:
        """Run and time one round of `work`, its requests taking turns through the variant's profiles."""
        import numpy as np
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        random = np.random.default_rng(1)
        size = self.llm.llm_engine.model_config.get_vocab_size()
        prompts = [{"prompt_token_ids": random.integers(10, size, work.prompt).tolist()} for _ in range(work.requests)]
        tasks = [i % variant.profiles for i in range(work.requests)] if variant.profiles else []
        extras = [{"hones_task": task_name(i)} for i in tasks] if variant.steered and tasks else [None] * work.requests
        params = [
            SamplingParams(temperature=0, max_tokens=work.new, ignore_eos=True, detokenize=False, extra_args=extra)
            for extra in extras
        ]
        loras = (
            [LoRARequest(task_name(i), i + 1, str(self._adapters / task_name(i))) for i in tasks]
            if variant.adapters
            else None
        )
        self.plugin.place(variant.steered)
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = self.llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Round(wall, cpu, [list(output.outputs[0].token_ids) for output in outputs])

    def check(self, variants: Sequence[Variant]) -> None:
        """Run a short round of each that does not count, and watch it.

        Raises:
            SystemExit: it is not what its row would say it is, so there is nothing to measure.
        """
        work = Work(REQUESTS, 2, 2)
        absent = self.round(work, ABSENT).tokens
        # At the end once more, because compiled code that was not taken off would go by the slots of the last round.
        for variant in (*variants, ABSENT):
            with calls_of_ours() as calls:
                tokens = self.round(work, variant).tokens
            if bool(calls) != variant.steered:
                raise SystemExit(f"{variant.name}: hones-steer ran {', '.join(sorted(calls)) or 'nothing'}")
            if (tokens != absent) != bool(variant.profiles):
                wrote = "what vLLM alone writes" if variant.profiles else "something else than vLLM alone"
                raise SystemExit(f"{variant.name}: the model wrote {wrote}")

    def memory(self, variant: Variant) -> int:
        """Bytes that a variant takes besides the model: tables and tokens' slots, or adapters."""
        if not variant.steered and not variant.adapters:
            return 0
        counted: Callable[[Any], int] = adapter_bytes if variant.adapters else table_bytes
        return int(self.llm.apply_model(counted)[0])


def table_bytes(model: Any) -> int:
    """Bytes of the scale tables and of the slots of the tokens."""
    names = ("hones_scaling.table", "hones_scaling.index")
    return sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(names))


def adapter_bytes(model: Any) -> int:
    """Bytes of the buffers that adapters are put into."""
    stacked = ("lora_a_stacked", "lora_b_stacked")
    return sum(t.nbytes for module in model.modules() for name in stacked for t in getattr(module, name, ()))


# Taking hones-steer off -----------------------------------------------------------------------------


class Plugin:
    """All that hones-steer has put into an engine that runs in this process: it can be taken off and put on again.

    That is: a hook of each down-projection, the wrapped methods of the model's runner and of the engine's front, and
    for a compiled model the code that was compiled with the hooks. Tables and slots stay in memory.

    Raises:
        SystemExit: something of it was not found, or vLLM did not compile the model.
    """

    def __init__(self, worker: Any, compiled: bool) -> None:
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.engine.output_processor import OutputProcessor

        self._worker = worker
        runner = worker.model_runner
        self._hooks = [
            (module._forward_pre_hooks, key, hook)
            for module in runner.get_model().modules()
            for key, hook in module._forward_pre_hooks.items()
            if _is_ours(hook)
        ]
        self._methods = [
            (owner, name, method)
            for owner in (runner, InputProcessor, OutputProcessor)
            for name, method in vars(owner).items()
            if _is_ours(method) and name != "__init__"
        ]
        if not self._hooks or {owner for owner, _, _ in self._methods} != {runner, InputProcessor, OutputProcessor}:
            raise SystemExit("hones-steer is not where this benchmark takes it off; see hones_serving.vllm")
        self._placed = True
        self._code: dict[bool, Any] = {}
        if compiled:
            self._compile_without()

    def place(self, wanted: bool) -> None:
        """Have it there, or not."""
        if wanted == self._placed:
            return
        for hooks, key, hook in self._hooks:
            if wanted:
                hooks[key] = hook
            else:
                del hooks[key]
        for owner, name, method in self._methods:
            setattr(owner, name, method if wanted else method.__wrapped__)
        if not wanted:  # it will not hear of the end of the requests that it has seen
            self._worker.hones_steering._profiles.clear()
        if self._code:
            vars(self._decoder()).update(self._code[wanted])
        self._placed = wanted

    def _decoder(self) -> Any:
        """The part of the model that vLLM compiles.

        Raises:
            SystemExit: vLLM compiles none.
        """
        from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

        for module in self._worker.model_runner.get_model().modules():
            if isinstance(module, TorchCompileWithNoGuardsWrapper) and not module.do_not_compile:
                return module
        raise SystemExit("vLLM does not compile the model (on a CPU, none with LoRA); use --modes eager")

    def _compile_without(self) -> None:
        """Have vLLM compile the model a second time, as it does where there is no plugin."""
        from vllm.compilation.wrapper import reset_compile_wrapper
        from vllm.config import set_current_vllm_config

        decoder, config = self._decoder(), self._worker.vllm_config
        code = {True: self._compiled(decoder)}
        self.place(False)
        ours = config.additional_config.pop("hones_steer")  # a part of the key of vLLM's stored code
        decoder.compiled = False
        with set_current_vllm_config(config):
            reset_compile_wrapper(decoder)
            code[False] = self._compiled(decoder)
        config.additional_config["hones_steer"] = ours
        self._code = code

    def _compiled(self, decoder: Any) -> dict[str, Any]:
        """The code that vLLM calls instead of the decoder's `forward`, by name: one of two, by how it compiles.

        Raises:
            SystemExit: it calls neither.
        """
        runner = self._worker.model_runner
        getattr(runner, "warming_up_model", runner.profile_run)()  # the former on CPUs; compiles if it was not done yet
        code = {name: getattr(decoder, name, None) for name in ("aot_compiled_fn", "_compiled_bytecode")}
        if not any(code.values()):
            raise SystemExit("vLLM did not compile the model; use --modes eager")
        return code


def _is_ours(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and _of_ours(code.co_filename)


def _of_ours(file: str) -> bool:
    return f"{os.sep}hones_serving{os.sep}" in file


@contextmanager
def calls_of_ours() -> Iterator[set[str]]:
    """A set that the names of hones_serving's functions are put into while the block calls them."""
    calls: set[str] = set()

    def look(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and _of_ours(frame.f_code.co_filename):
            calls.add(frame.f_code.co_qualname)

    sys.setprofile(look)
    try:
        yield calls
    finally:
        sys.setprofile(None)


# Rows ---------------------------------------------------------------------------------------------


def compared(mine: Sequence[Round], absent: Sequence[Round], work: Work) -> dict[str, Any]:
    """Speed by either clock, and what a step takes more: each repeat to its own `absent` round."""
    pairs = list(zip(mine, absent, strict=True))
    added = [1000 * (one.cpu - other.cpu) / work.new for one, other in pairs]
    return {
        **median_interval("wall", [other.wall / one.wall for one, other in pairs]),
        **median_interval("cpu", [other.cpu / one.cpu for one, other in pairs]),
        **median_interval("added_ms", added),
        "tokens_per_s": work.tokens / statistics.median(one.wall for one in mine),
        "n": len(pairs),
    }


def kv_blocks(steering: int, block: int, gib: float) -> dict[str, int]:
    """KV blocks that fit into `gib` beside what steering takes, and how many fewer these are than without it."""
    budget = int(gib * 2**30)
    fit = (budget - steering) // block
    return {"kv_blocks": fit, "kv_blocks_lost": budget // block - fit}


def is_wide(row: Mapping[str, Any]) -> bool:
    """Whether a row's interval by CPU time is too wide to decide anything."""
    return bool(max(row["cpu_high"] - row["cpu"], row["cpu"] - row["cpu_low"]) > WIDE)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people, as Markdown."""
    lines = [
        "| runner | mode | phase | profiles | tokens/s | by wall time | by CPU time | ms a step | n | KV blocks |",
        "|---|---|---|---|---:|---|---|---|---:|---:|",
    ]
    for row in rows:
        wall, cpu = (f"{row[c]:.3f} [{row[f'{c}_low']:.3f}, {row[f'{c}_high']:.3f}]" for c in ("wall", "cpu"))
        added = f"{row['added_ms']:.2f} [{row['added_ms_low']:.2f}, {row['added_ms_high']:.2f}]"
        lost = f"{-row['kv_blocks_lost']} of {row['kv_blocks'] + row['kv_blocks_lost']:,}"
        what = f"{row['runner']} | {row['mode']} | {row['phase']} | {row['name']} | {row['tokens_per_s']:,.0f}"
        lines.append(f"| {what} | {wall} | {cpu}{' wide' * is_wide(row)} | {added} | {row['n']} | {lost} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
