"""Tokens per second of a Hugging Face model with hones-steer, as ratios to the same model without it.

    .venv/bin/python benchmarks/hf_runtime.py

(about a quarter of an hour on one core, much of it compiling) compares, eager and compiled, prefill and decode, batch 1
and 8,

    unsteered       transformers as it comes
    again           the same model once more: how far from 1 a ratio gets by chance
    hooked, idle    steer() is attached and no task is chosen
    hooked, 1 or 8  one task for the whole batch, or another one for each of its eight rows
    unguarded       hooked without the guard against layers that are passed by: what the guard costs
    folded          steering.fold(): the scales are in the weights, the hooks are still there
    merged          a checkpoint written by merge_into, loaded by transformers
    ia3, lora       the same scaling, exported to PEFT; called past PEFT's outer module, which is to their advantage

The model is a Llama of SmolLM2-135M's shape with random weights, in float32; a profile scales 1% of every layer's
neurons. Compiled, it is a fifth of that, 6 layers and a fifth of the vocabulary, because every variant, phase and batch
size is compiled by itself (`--compiled-layers 30`: all of it). All variants live in one process and share the memory of
every weight that is the same. A round is one prefill, or a few decode steps; variants take turns in an order that moves
on by one with every round, and a ratio is to the `unsteered` round of the same repeat. The table gives the median over
the repeats and, in brackets, the smallest and the largest. With one thread, seconds are CPU time of the process, which
stands still while others have the core. Before anything is timed, all ways to apply the same profile must agree with
each other, and differ from the unsteered model.

Further tables give the time to switch from one task to another, to load and validate a profile and to import us, and
bytes on disk.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ALLOCATOR, SMOLLM2_135M, TINY, Shape, positive, random_llama, random_profile, ratios, task_name

if TYPE_CHECKING:
    from hones_steer import Profile, Steering

MODES = ("eager", "compiled")
PHASES = ("prefill", "decode")
BATCHES = (1, 8)
SLOTS = 8  # of the scale tables; with one profile more, every switch can be made one that writes a slot


@dataclass(frozen=True)
class Variant:
    """One row's way of running the model, with so many different profiles in a batch."""

    engine: str
    mode: str
    profiles: int | None = None


UNSTEERED = Variant("transformers", "unsteered")
HOOKED = Variant("transformers", "hooked", 1)
VARIANTS = (
    UNSTEERED,
    Variant("transformers", "again"),
    Variant("transformers", "hooked", 0),
    HOOKED,
    Variant("transformers", "unguarded", 1),
    Variant("transformers", "hooked", 8),
    Variant("transformers", "folded", 1),
    Variant("transformers", "merged", 1),
    Variant("peft", "ia3", 1),
    Variant("peft", "lora", 1),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = _parser().parse_args(argv)
    _pin({**ALLOCATOR, "OMP_NUM_THREADS": str(args.threads)})
    with tempfile.TemporaryDirectory(prefix="hones-benchmark-") as folder:
        rows = measure(args, Path(folder))
    print(json.dumps(rows, indent=1) if args.json else tables(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tokens per second of a Hugging Face model unsteered, hooked, folded, merged, and with PEFT's IA3 "
        "and LoRA; time to switch, load and import; bytes on disk.",
        epilog="The top of this file says how it is measured. Close everything else: the others' work is noise here.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of tables")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one repeat: does it run?")
    parser.add_argument("--repeats", type=positive, default=11, metavar="N", help="rounds per row (default: 11)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of PyTorch (default: 1)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="default: both")
    parser.add_argument("--batches", nargs="+", type=positive, default=BATCHES, metavar="N", help="default: 1 8")
    parser.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="of prefill (default: 64)")
    parser.add_argument("--steps", type=positive, default=4, metavar="N", help="of decode, per round (default: 4)")
    parser.add_argument(
        "--compiled-layers", type=positive, default=6, metavar="N", help="of the compiled model, of 30 (default: 6)"
    )
    return parser


def _pin(environment: Mapping[str, str]) -> None:
    """Start this program again in an environment that is only read when a process starts."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.environ.update(environment)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of all modes, phases and batch sizes, then those of switching, loading, importing and of files."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    whole = TINY if args.quick else SMOLLM2_135M
    part = whole if args.quick else first_layers(whole, args.compiled_layers)
    if args.quick:
        args.repeats = 1
    rows: list[dict[str, Any]] = []
    rounds = sum(len(variants(batch)) for batch in args.batches) * len(args.phases) * len(args.modes) * args.repeats
    with torch.no_grad(), tqdm(total=rounds, unit="round", disable=None) as bar:
        models = Models(whole, folder / "whole")
        if "eager" in args.modes:
            rows += speeds(models, args, compiled=False, bar=bar)
        if "compiled" in args.modes:
            rows += speeds(Models(part, folder / "part"), args, compiled=True, bar=bar)
        count = 3 if args.quick else 20
        rows += switching(models, count) + loading(models.folder, count)
    return rows + importing(1 if args.quick else 5) + files(models)


def first_layers(shape: Shape, layers: int) -> Shape:
    """Take that many layers, and the same share of the vocabulary: the unembedding weighs what it does in the whole."""
    return replace(shape, layers=layers, vocabulary=shape.vocabulary * layers // shape.layers)


def variants(batch: int) -> list[Variant]:
    """Those that make sense for a batch of this size."""
    return [variant for variant in VARIANTS if (variant.profiles or 0) <= batch]


# Models -------------------------------------------------------------------------------------------


class Models:
    """The same model, once for each way to steer it; `folder` keeps their files."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        import numpy as np
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        from hones_steer import export_lora, export_peft, merge_into, save_profile, steer

        self.shape, self.folder = shape, folder
        plain = random_llama(shape)
        random = np.random.default_rng(0)
        self.profiles = {task_name(i): random_profile(plain, shape, task_name(i), random) for i in range(SLOTS + 1)}
        plain.save_pretrained(folder / "model")
        for name, profile in self.profiles.items():
            save_profile(profile, folder / f"{name}.safetensors")
        for name in list(self.profiles)[:2]:
            export_peft(self.profiles[name], plain, folder / "ia3" / name)
            export_lora(self.profiles[name], plain, folder / "lora" / name)
        first = task_name(0)
        merge_into(self.profiles[first], folder / "model", folder / "merged")
        merged = LlamaForCausalLM.from_pretrained(folder / "merged").eval()
        hooked, folded = twin(plain), twin(plain, own="down_proj")
        self.steering = steer(hooked, self.profiles, max_profiles=SLOTS)
        unguarded = twin(plain)
        self.unguarded = without_guard(steer(unguarded, self.profiles, max_profiles=SLOTS), unguarded)
        self.folded = steer(folded, self.profiles)
        self.folded.fold(first)
        self.adapted = {
            kind: PeftModel.from_pretrained(twin(plain), str(folder / kind / first), adapter_name=first).eval()
            for kind in ("ia3", "lora")
        }
        self.by_mode = {
            "unsteered": plain,
            "hooked": hooked,
            "unguarded": unguarded,
            "folded": folded,
            "merged": share(merged, plain),
            **{kind: model.get_base_model() for kind, model in self.adapted.items()},
        }
        self.by_mode["again"] = plain

    def steered(self, variant: Variant) -> AbstractContextManager[None]:
        """Within the block, the variant's model does what the variant says."""
        steering = {"hooked": self.steering, "unguarded": self.unguarded}.get(variant.mode)
        if steering is None or not variant.profiles:
            return nullcontext()
        if variant.profiles == 1:
            return steering.task(task_name(0))
        return steering.tasks([task_name(i) for i in range(variant.profiles)])


def without_guard(steering: Steering, model: Any) -> Steering:
    """The steering of a model, no longer looking for layers that are passed by and parts that were replaced."""
    from hones_steer.injection import GuardHook

    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, GuardHook):
                del module._forward_hooks[key]
    steering._attached.injection._edges.clear()
    return steering


def twin(model: Any, own: str = "nothing") -> Any:
    """A copy that shares the memory of all weights but those with `own` in their name."""
    return copy.deepcopy(model, {id(p): p for name, p in model.named_parameters() if own not in name})


def share(model: Any, other: Any) -> Any:
    """`model`, its weights in the memory of `other`'s where they are the same."""
    for name, weight in model.named_parameters():
        if weight.equal(other.get_parameter(name)):
            weight.data = other.get_parameter(name).data
    return model


# Speed --------------------------------------------------------------------------------------------


def speeds(models: Models, args: argparse.Namespace, *, compiled: bool, bar: Any) -> list[dict[str, Any]]:
    """The rows of all batch sizes and phases."""
    clock = time.process_time if args.threads == 1 else time.perf_counter
    rows = []
    for batch in args.batches:
        for phase in args.phases:
            tokens = batch * (args.prompt_tokens if phase == "prefill" else args.steps)
            with compiling({"backend": "eager" if args.quick else "inductor"} if compiled else None) as compile_:
                rounds = {variant: Round(models, variant, phase, batch, args, compile_) for variant in variants(batch)}
                check(rounds)
                seconds = interleaved(rounds, args.repeats, clock, bar)
            measured = [
                {"engine": variant.engine, "mode": variant.mode, "phase": phase, "profiles": variant.profiles}
                | {"batch": batch, "compiled": compiled, "layers": models.shape.layers}
                | {**ratios(mine, seconds[UNSTEERED]), "tokens_per_s": tokens / statistics.median(mine)}
                for variant, mine in seconds.items()
            ]
            print(speed_table(measured), file=sys.stderr, flush=True)
            rows += measured
    return rows


@contextmanager
def compiling(options: Mapping[str, str] | None) -> Iterator[Callable[[Any], Any]]:
    """A function that compiles a model, always the same one for the same model, or leaves it as it is (None)."""
    import torch

    if options is None:
        yield lambda model: model
        return
    torch.compiler.reset()
    kept: dict[int, Any] = {}
    # Dynamo counts the variants as recompilations of Llama's forward, and would give up (loudly) after eight.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield lambda model: kept.setdefault(id(model), torch.compile(model, fullgraph=True, dynamic=False, **options))


class Round:
    """One variant's round; made with a call that does not count, which compiles and whose logits are kept."""

    def __init__(
        self, models: Models, variant: Variant, phase: str, batch: int, args: argparse.Namespace, compile_: Any
    ) -> None:
        import torch
        from transformers import StaticCache

        from hones_steer._transformers import cache_name

        model = models.by_mode[variant.mode]
        prompt = torch.randint(models.shape.vocabulary, (batch, args.prompt_tokens), generator=torch.manual_seed(1))
        self._steered = lambda: models.steered(variant)
        self._call = compile_(model)
        self._steps = 1 if phase == "prefill" else args.steps
        self._inputs = {"input_ids": prompt, "use_cache": False, "logits_to_keep": 1}
        with self._steered():
            if phase == "decode":
                room = args.prompt_tokens + 1 + args.repeats * args.steps
                cache = StaticCache(config=model.config, max_cache_len=room)
                cached = {cache_name(model.forward): cache}
                model(input_ids=prompt, **cached)
                self._inputs = {"input_ids": prompt[:, :1], **cached}
            self.logits = self._call(**self._inputs).logits.clone()

    def seconds(self, clock: Callable[[], float]) -> float:
        """Run and time it."""
        with self._steered():
            start = clock()
            for _ in range(self._steps):
                self._call(**self._inputs)
            return clock() - start


def check(rounds: Mapping[Variant, Round]) -> None:
    """All that apply the first profile must agree, and differ from the model without it.

    Raises:
        SystemExit: they do not, so there is nothing to measure.
    """
    for variant, found in rounds.items():
        steered, plain = (_close(found.logits, rounds[like].logits) for like in (HOOKED, UNSTEERED))
        if (plain, steered) != ((False, True) if variant.profiles == 1 else (not variant.profiles, False)):
            raise SystemExit(f"{variant.engine} {variant.mode}, {variant.profiles} profiles: the logits are not right")


def _close(one: Any, other: Any) -> bool:
    return bool((one - other).abs().max() < 1e-2 * other.abs().max())


def interleaved(
    rounds: Mapping[Variant, Round], repeats: int, clock: Callable[[], float], bar: Any
) -> dict[Variant, list[float]]:
    """Seconds of each variant's rounds, one per repeat."""
    order = list(rounds)
    seconds: dict[Variant, list[float]] = {variant: [] for variant in order}
    for repeat in range(repeats):
        for i in range(len(order)):
            variant = order[(i + repeat) % len(order)]
            seconds[variant].append(rounds[variant].seconds(clock))
            bar.update()
    return seconds


# Everything that happens once -----------------------------------------------------------------------


def switching(models: Models, count: int) -> list[dict[str, Any]]:
    """From one task to another; the hooks' switch is what entering and leaving a block take together."""
    import torch

    ids = torch.ones(1, 1, dtype=torch.long)
    slots_kept, slots_written, fold = [], [], []
    for i in range(count):
        slots_kept.append(_block(models, task_name(i % 2), ids))
    for i in range(count + len(models.profiles)):
        slots_written.append(_block(models, task_name(i % len(models.profiles)), ids))
    for i in range(count):
        fold.append(_time(partial(_refold, models.folded, task_name(i % 2))))
    rows = [
        _timing("transformers", "hooked", "switch", slots_kept),
        _timing("transformers", "hooked, its scales not in a slot yet", "switch", slots_written[-count:]),
        _timing("transformers", "folded", "switch", fold),
    ]
    for kind, adapted in models.adapted.items():
        adapted.load_adapter(str(models.folder / kind / task_name(1)), adapter_name=task_name(1))
        times = [_time(partial(adapted.set_adapter, task_name(i % 2))) for i in range(count)]
        rows.append(_timing("peft", kind, "switch", times))
    return rows


def _block(models: Models, task: str, ids: Any) -> float:
    block = models.steering.task(task)
    entering = _time(block.__enter__)
    models.by_mode["hooked"](input_ids=ids)  # a block without a forward is an error
    return entering + _time(lambda: block.__exit__(None, None, None))


def _refold(steering: Steering, task: str) -> None:
    steering.unfold()
    steering.fold(task)


def loading(folder: Path, count: int) -> list[dict[str, Any]]:
    """A profile from disk, everything validated."""
    from hones_steer import load_profile, save_profile

    save_profile(profile_7b(), folder / "7b.safetensors")
    return [
        _timing("hones_steer", name, "load", [_time(partial(load_profile, folder / file)) for _ in range(count)])
        for name, file in (("profile", f"{task_name(0)}.safetensors"), ("LLaVA-1.5-7B's profile", "7b.safetensors"))
    ]


def profile_7b() -> Profile:
    """1% of the neurons of a model of LLaVA-1.5-7B's shape."""
    import numpy as np

    from hones_steer import ModelIdentity, Profile

    layers = {i: (np.arange(0, 11_000, 100, dtype=np.int32), np.full(110, 1.5, np.float32)) for i in range(32)}
    identity = ModelIdentity(
        name="",
        revision=None,
        model_type="llava",
        num_layers=32,
        intermediate_size=11_008,
        hidden_size=4096,
        sketch=(1.0,) * 16,
    )
    return Profile("vqa", layers, identity)


def importing(count: int) -> list[dict[str, Any]]:
    """In processes of their own; each import in turn, `count` times."""
    statements = {
        "numpy and safetensors alone": "import numpy, safetensors.numpy",
        "hones_steer": "import hones_steer",
        "hones_steer.load_profile": "from hones_steer import load_profile",
        "torch alone": "import torch",
        "hones_steer.steer": "from hones_steer import steer",
    }
    times: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(count):
        for name, statement in statements.items():
            code = f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            times[name].append(float(done.stdout))
    return [_timing("hones_steer", name, "import", seconds) for name, seconds in times.items()]


def files(models: Models) -> list[dict[str, Any]]:
    """Bytes of one task on disk."""
    first = task_name(0)
    paths = {
        ("hones_steer", "profile"): models.folder / f"{first}.safetensors",
        ("hones_steer", "LLaVA-1.5-7B's profile"): models.folder / "7b.safetensors",
        ("peft", "ia3"): models.folder / "ia3" / first / "adapter_model.safetensors",
        ("peft", "lora"): models.folder / "lora" / first / "adapter_model.safetensors",
    }
    return [
        {"engine": engine, "mode": mode, "phase": "file", "bytes": path.stat().st_size}
        for (engine, mode), path in paths.items()
    ]


def _time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _timing(engine: str, mode: str, phase: str, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "engine": engine,
        "mode": mode,
        "phase": phase,
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "n": len(seconds),
    }


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of tokens per second for people, as Markdown."""
    lines = ["| | batch | phase | variant | tokens/s | ratio to unsteered | n |", "|---|---:|---|---|---:|---|---:|"]
    for row in rows:
        count = {None: "", 0: ", idle", 1: ""}.get(row["profiles"], f", {row['profiles']} profiles")
        ratio = f"{row['ratio']:.3f} ({row['ratio_min']:.3f}–{row['ratio_max']:.3f})"
        kind = "compiled" if row["compiled"] else "eager"
        name = f"{row['mode']}{count}"
        speed = f"{row['tokens_per_s']:,.0f}"
        lines.append(f"| {kind} | {row['batch']} | {row['phase']} | {name} | {speed} | {ratio} | {row['n']} |")
    return "\n".join(lines)


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows for people, as Markdown."""
    lines = [speed_table([row for row in rows if "ratio" in row])]
    lines += ["", "| | of | ms | n |", "|---|---|---|---:|"]
    for row in rows:
        if "seconds" in row:
            low, middle, high = (1000 * row[name] for name in ("seconds_min", "seconds", "seconds_max"))
            what = f"{row['phase']} | {row['engine']} {row['mode']}"
            lines.append(f"| {what} | {middle:.3g} ({low:.3g}–{high:.3g}) | {row['n']} |")
    lines += ["", "| file of | bytes |", "|---|---:|"]
    lines += [f"| {row['engine']} {row['mode']} | {row['bytes']:,} |" for row in rows if "bytes" in row]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
