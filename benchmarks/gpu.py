"""On one GPU: what steering costs a Hugging Face model, and what attribution takes of what docs/scaling.md computes.

    .venv/bin/python benchmarks/gpu.py

(8 minutes; `--minutes` gives it more) builds a LLaVA of LLaVA-1.5-7B's shape with random weights on the GPU, in
bfloat16. Where there is no GPU, or with `--small`, it is a small one, and takes two minutes on a CPU: its numbers say
that this runs, and nothing about a GPU.

Runtime: tokens per second, for prefill and decode, batch 1 and 32,

    unsteered       transformers as it comes
    again           the same model once more: how far from 1 a ratio gets by chance
    hooked, idle    steer() is attached and no task is chosen
    hooked, 1 or 8  one task for the whole batch, or eight, the batch's rows taking turns

in the modes eager, compiled (Inductor, whole graph, static shapes) and graphs (`reduce-overhead`: the same with CUDA
graphs, on a GPU only; a row of a graph that Inductor skipped says so). Compiled models have `--compiled-layers` of the
layers and the same share of the vocabulary, because compiling takes minutes. Prefill is one forward of a prompt as long
as LLaVA's with an image, whose tokens are text here: the vision tower is never steered, and would only bring ratios
nearer to 1. Decode is `--steps` forwards of a token per row in a static cache with room for such a prompt. Rounds of
the variants take turns in an order that moves on by one; a ratio is to the `unsteered` round of the same repeat. Given
are the median and its 95% interval by ranks. The clock is the wall's, around rounds that begin and end with nothing
left to do on the GPU; on a CPU with one thread it is CPU time. Before anything is timed, an idle model must write what
the unsteered one does, and a steered one must not.

Attribution: seconds for a head and an example, of head scores by log-probability with a few heads of every layer, and
of the importance that these heads guide, against `examples/scaling/estimate.py` for as many tokens, examples and heads
on this model's shape, at `--tflops` and `--utilisation` (its defaults: an A100 at 40%). Beside it: operations per
second that this is by the estimate's count, and what the largest matrix product of a layer reaches here with as many
tokens; their quotient is the utilisation to give the estimate, with that rate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Shape, in_turn, median_interval, positive, random_profile, task_name
from hf_runtime import compiling, twin
from hones_offline.attribution.heads import statistics_of
from hones_offline.attribution.write_in import head_guided_importance, target_directions
from hones_offline.data.examples import Example, MemoryImage
from hones_offline.data.tasks import JsonlTask
from hones_offline.running.execution import Execution
from hones_offline.running.models import keep_freed_memory
from hones_offline.running.prompts import Prepared, prepare
from PIL import Image
from torch._dynamo.utils import counters

from hones_steer import Steering, steer
from hones_steer._transformers import cache_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiny_processors

from examples.scaling import estimate

MODES = ("eager", "compiled", "graphs")
PHASES = ("prefill", "decode")
SLOTS = 8
WARM_UPS = 3  # rounds that do not count: with CUDA graphs the first compiles, the second records, the third replays
IMAGE = 4  # the image token's id
SEED = 0


@dataclass(frozen=True)
class LlavaShape:
    """A LLaVA's size: its text model's and its vision tower's, whose images are `side` pixels wide and high."""

    name: str
    text: Shape
    side: int
    patch: int
    vision_layers: int
    vision_hidden: int
    vision_ffn: int
    vision_heads: int

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return (self.side // self.patch) ** 2


LLAVA_7B = LlavaShape("LLaVA-1.5-7B", Shape(32, 4096, 11008, 32, 32, 32_064), 336, 14, 24, 1024, 4096, 16)
SMALL = LlavaShape("small LLaVA", Shape(8, 256, 704, 8, 8, 4096), 56, 14, 2, 128, 512, 4)
TINY = LlavaShape("tiny LLaVA", Shape(2, 64, 256, 4, 4, 256), 28, 14, 2, 32, 64, 2)


@dataclass(frozen=True)
class Variant:
    """One row's way of running the model; `profiles`: None, no hooks; 0, idle; else how many are in a batch."""

    name: str
    profiles: int | None = None


UNSTEERED, IDLE = Variant("unsteered"), Variant("hooked, idle", 0)
VARIANTS = (UNSTEERED, Variant("again"), IDLE, Variant("hooked, 1", 1), Variant(f"hooked, {SLOTS}", SLOTS))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = _parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    try:
        rows = measure(args)
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(f"{error}\nthe GPU has too little memory for this; take --batches 1, or --small") from None
    print(json.dumps(rows, indent=1) if args.json else tables(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="On one GPU: tokens per second of a steered Hugging Face model, as ratios to the unsteered one, "
        "and attribution's seconds for a head and an example beside what examples/scaling/estimate.py computes.",
        epilog="The top of this file says how it is measured. Nothing else may use the GPU meanwhile.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of tables")
    parser.add_argument("--small", action="store_true", help="a small model (default where there is no GPU)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, as few rounds as can be: does it run?")
    parser.add_argument("--cpu", action="store_true", help="do not use the GPU")
    parser.add_argument("--minutes", type=float, metavar="N", help="for everything (default: 8; small: 2)")
    parser.add_argument(
        "--repeats", type=positive, default=40, metavar="N", help="rounds per row at most (default: 40)"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of PyTorch (default: its own)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="default: both")
    parser.add_argument("--batches", nargs="+", type=positive, default=(1, 32), metavar="N", help="default: 1 32")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="default: bfloat16"
    )
    parser.add_argument(
        "--text-tokens", type=positive, default=44, metavar="N", help="beside the image's (default: 44)"
    )
    parser.add_argument("--steps", type=positive, default=8, metavar="N", help="of decode, per round (default: 8)")
    parser.add_argument(
        "--compiled-layers", type=positive, default=4, metavar="N", help="of compiled models, at most (default: 4)"
    )
    parser.add_argument("--no-attribution", action="store_true", help="leave attribution out")
    parser.add_argument("--examples", type=positive, default=16, metavar="N", help="of attribution (default: 16)")
    parser.add_argument("--heads", type=positive, default=1, metavar="N", help="scored in each layer (default: 1)")
    parser.add_argument("--tflops", type=float, default=312, help="the estimate's peak (default: 312, an A100's)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="the estimate's share of it (default: 0.4)")
    return parser


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row that names the machine, then those of the runtime and of attribution."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    small = args.small or device.type == "cpu"
    shape = TINY if args.quick else SMALL if small else LLAVA_7B
    minutes = args.minutes if args.minutes is not None else 2.0 if small else 8.0
    minutes = 0.0 if args.quick else minutes
    deadline = time.monotonic() + 60 * minutes
    rows = [machine(device, args)]
    print(machine_line(rows[0]), file=sys.stderr, flush=True)
    with torch.no_grad():
        attributing = not args.no_attribution
        whole = random_llava(shape, device, args.dtype)
        cells = [(mode, batch, phase) for mode in args.modes for batch in args.batches for phase in args.phases]
        if device.type == "cpu":
            cells = [cell for cell in cells if cell[0] != "graphs"]
        rows += speeds(args, shape, whole, cells, deadline - 60 * minutes / 4 * attributing)
        if attributing:
            rows += attribution(args, shape, whole, deadline)
    return rows


def machine(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The row of the machine: device, memory, versions, threads, dtype."""
    import transformers

    import hones_steer

    found: dict[str, Any] = {
        "part": "machine",
        "device": platform.processor() or platform.machine(),
        "memory_gib": None,
        "cuda": None,
        "driver_capability": None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hones_steer": hones_steer.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["memory_gib"] = properties.total_memory / 2**30
        found["cuda"] = torch.version.cuda
        found["driver_capability"] = f"{properties.major}.{properties.minor}"
    return found


# Models -------------------------------------------------------------------------------------------


def random_llava(shape: LlavaShape, device: torch.device, dtype: str) -> Any:
    """A LLaVA on the device, its weights of unit gain and always the same."""
    with device:
        model = llava_of(shape, dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weight.normal_(mean, 0.1, generator=generator)
        else:
            weight.normal_(0, 1 if "embed" in name else weight[0].numel() ** -0.5, generator=generator)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model


def llava_of(shape: LlavaShape, dtype: str) -> Any:
    """A LLaVA as transformers initializes it."""
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = shape.text
    config = LlavaConfig(
        text_config=LlamaConfig(
            num_hidden_layers=text.layers,
            hidden_size=text.hidden,
            intermediate_size=text.ffn,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            vocab_size=text.vocabulary,
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=shape.vision_ffn,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=shape.side,
            patch_size=shape.patch,
            projection_dim=shape.vision_hidden,
        ),
        image_token_id=IMAGE,
        image_seq_length=shape.image_tokens,
    )
    return AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype)).eval()


class Models:
    """A model without hooks and its twin with them, on the same weights."""

    def __init__(self, shape: LlavaShape, plain: Any) -> None:
        random = np.random.default_rng(SEED)
        profiles = {task_name(i): random_profile(plain, shape.text, task_name(i), random) for i in range(SLOTS)}
        self.shape, self.plain, self.hooked = shape, plain, twin(plain)
        self.steering: Steering = steer(self.hooked, profiles, max_profiles=SLOTS)

    def of(self, variant: Variant) -> Any:
        """The model that a variant runs."""
        return self.plain if variant.profiles is None else self.hooked

    def steered(self, variant: Variant, batch: int) -> AbstractContextManager[None]:
        """Within the block, the variant's model does what the variant says."""
        if not variant.profiles:
            return nullcontext()
        return self.steering.tasks([task_name(i % variant.profiles) for i in range(batch)])


def first_layers(shape: LlavaShape, layers: int) -> LlavaShape:
    """At most so many layers, and the same share of the vocabulary."""
    text = shape.text
    layers = min(layers, text.layers)
    return replace(shape, text=replace(text, layers=layers, vocabulary=text.vocabulary * layers // text.layers))


# Runtime ------------------------------------------------------------------------------------------


def speeds(
    args: argparse.Namespace,
    shape: LlavaShape,
    whole: Any,
    cells: Sequence[tuple[str, int, str]],
    deadline: float,
) -> list[dict[str, Any]]:
    """The rows of all cells, (mode, batch, phase), which share the time that is left."""
    rows: list[dict[str, Any]] = []
    of_mode: dict[bool, Models] = {}
    for number, (mode, batch, phase) in enumerate(cells):
        compiled = mode != "eager"
        if compiled not in of_mode:
            of_mode.clear()  # nothing is compiled for the whole model, so its twin is not needed again
            part = first_layers(shape, args.compiled_layers) if compiled else shape
            of_mode[compiled] = Models(part, random_llava(part, whole.device, args.dtype) if compiled else whole)
        with peak_memory(whole.device) as peak, compiling(_options(mode, args.quick)) as compile_:
            counters.clear()
            end = time.monotonic() + (deadline - time.monotonic()) / (len(cells) - number)
            cell = Cell(of_mode[compiled], batch, phase, args, compile_)
            cell.check()
            seconds = in_turn(cell.variants, cell.seconds, end - time.monotonic(), args.repeats)
        measured = [
            {"part": "runtime", "mode": mode, "batch": batch, "phase": phase, "variant": variant.name}
            | {"profiles": variant.profiles, "layers": of_mode[compiled].shape.text.layers, "n": len(mine)}
            | median_interval("ratio", [u / m for m, u in zip(mine, seconds[UNSTEERED], strict=True)])
            | {"tokens_per_s": cell.tokens / statistics.median(mine), "peak_gib": peak[0]}
            | {"graphs_skipped": counters["inductor"]["cudagraph_skips"]}
            for variant, mine in seconds.items()
        ]
        print(speed_table(measured), file=sys.stderr, flush=True)
        rows += measured
    return rows


def _options(mode: str, quick: bool) -> dict[str, str] | None:
    """How a mode compiles; None: not at all."""
    if mode == "eager":
        return None
    if mode == "graphs":
        return {"mode": "reduce-overhead"}
    return {"backend": "eager" if quick else "inductor"}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float | None]]:
    """A list whose one element is, after the block, the most GiB that its tensors took on the GPU; None on a CPU."""
    peak: list[float | None] = [None]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated(device) / 2**30


class Clock:
    """Seconds, at a moment at which the device has nothing left to do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._read = time.perf_counter
        if device.type == "cpu" and torch.get_num_threads() == 1:
            self._read = time.process_time

    def __call__(self) -> float:
        """Wait for the device, then read."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._read()


class Cell:
    """The variants of one mode, batch size and phase, ready to be timed."""

    def __init__(self, models: Models, batch: int, phase: str, args: argparse.Namespace, compile_: Any) -> None:
        from transformers import StaticCache

        self._models, self._batch, self._compile = models, batch, compile_
        self.variants = [variant for variant in VARIANTS if (variant.profiles or 0) <= batch]
        self._steps = 1 if phase == "prefill" else args.steps
        prompt = models.shape.image_tokens + args.text_tokens
        self.tokens = batch * (prompt if phase == "prefill" else args.steps)
        device = models.plain.device
        self._clock = Clock(device)
        random = torch.Generator().manual_seed(SEED)
        ids = torch.randint(IMAGE + 1, models.shape.text.vocabulary, (batch, prompt), generator=random).to(device)
        self._cache = None
        self._inputs = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
        if phase == "decode":  # all take turns in one cache; how long a step takes depends on its room alone
            self._cache = StaticCache(config=models.plain.config, max_cache_len=prompt + args.steps)
            self._inputs = {"input_ids": ids[:, :1].clone(), cache_name(models.plain.forward): self._cache}
            models.plain(**self._inputs)  # makes the cache's tensors, outside of compiled code

    def check(self) -> None:
        """Run rounds that do not count, and compare logits.

        Raises:
            SystemExit: steering does not change them, or a model with hooks is not idle when it should be.
        """
        last = {variant: self._logits(variant) for variant in self.variants}
        plain = last[UNSTEERED]
        noise = max(_distance(last[variant], plain) for variant in self.variants if not variant.profiles)
        for variant in self.variants:
            if variant.profiles and not _distance(last[variant], plain) > 2 * noise:
                raise SystemExit(f"{variant.name}: the logits are those of the unsteered model; nothing is measured")

    def _logits(self, variant: Variant) -> Any:
        for _ in range(WARM_UPS):
            logits = self._run(variant)[1]
        return logits

    def seconds(self, variant: Variant) -> float:
        """Run a round and time it."""
        return self._run(variant)[0]

    def _run(self, variant: Variant) -> tuple[float, Any]:
        """Seconds and the last logits, float32."""
        call = self._compile(self._models.of(variant))
        if self._cache is not None:
            self._cache.reset()
        with self._models.steered(variant, self._batch):
            start = self._clock()
            for _ in range(self._steps):
                logits = call(**self._inputs).logits
            end = self._clock()
        return end - start, logits.float()  # a copy: the next replay of a CUDA graph writes to the same memory


def _distance(one: Any, other: Any) -> float:
    return float((one - other).abs().max())


# Attribution --------------------------------------------------------------------------------------


def attribution(args: argparse.Namespace, shape: LlavaShape, model: Any, deadline: float) -> list[dict[str, Any]]:
    """The rows of head scores and of importance."""
    device = model.device
    prepared = prepared_examples(args, shape, model)
    heads = [[(layer, head) for head in range(min(args.heads, shape.text.heads))] for layer in range(shape.text.layers)]
    guides = [(layer, head, 1.0) for of_layer in heads for layer, head in of_layer]
    directions = target_directions(prepared)
    run = estimated(args, shape, model, prepared, len(guides))
    execution = Execution(batch_size=args.examples, memory_gb=max(0.1, 2 * run.gib()["states"]))
    # A first call finds kernels and memory; one head of the last layer shows it all.
    statistics_of(prepared, "logprob", [[] for _ in heads[:-1]] + [heads[-1][:1]], execution)
    head_guided_importance(prepared, directions, guides[-1:], execution)
    steps: dict[str, Callable[[], object]] = {
        "head scores": lambda: statistics_of(prepared, "logprob", heads, execution),
        "importance": lambda: head_guided_importance(prepared, directions, guides, execution),
    }
    forwards = dict(zip(steps, run.layer_forwards(), strict=True))
    clock = Clock(device)
    rows = []
    with peak_memory(device) as peak:
        seconds = in_turn(list(steps), lambda name: timed(steps[name], clock), deadline - time.monotonic(), 20, least=2)
    reached = matmul_tflops(shape, device, args.dtype, args.examples * run.prompt, clock)
    for name, times in seconds.items():
        flops = forwards[name] * run.shape.layer_flops(run.tokens if name == "head scores" else run.prompt)
        computed = flops / (args.tflops * 1e12 * args.utilisation)
        middle, of = statistics.median(times), len(guides) * len(prepared)
        rows.append(
            {"part": "attribution", "step": name, "examples": len(prepared), "heads": len(guides), "prompt": run.prompt}
            | {"seconds": middle, "seconds_min": min(times), "seconds_max": max(times), "n": len(times)}
            | {"per_head_and_example": middle / of, "estimate": computed / of, "over_estimate": middle / computed}
            | {"layer_forwards": forwards[name], "tflops": flops / middle / 1e12, "matmul_tflops": reached}
            | {"utilisation": flops / middle / 1e12 / reached, "peak_gib": peak[0]}
        )
    return rows


def timed(function: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds that a call takes."""
    start = clock()
    function()
    return clock() - start


def prepared_examples(args: argparse.Namespace, shape: LlavaShape, model: Any) -> Prepared:
    """Examples with random images and words, encoded; their answers have about ten tokens."""
    random = np.random.default_rng(SEED)
    words = tiny_processors.WORDS
    examples = []
    for i in range(args.examples):
        pixels = random.integers(0, 255, (shape.side, shape.side, 3), dtype=np.uint8)
        question, answer = (" ".join(random.choice(words[2:30], n)) for n in (max(1, args.text_tokens - 3), 9))
        examples.append(Example(str(i), question, (answer,), MemoryImage(Image.fromarray(pixels), f"random-{i}")))
    task = JsonlTask("random", "anls", 10)
    return prepare(model, tiny_processors.llava_processor(model.config), task, examples)


def estimated(
    args: argparse.Namespace, shape: LlavaShape, model: Any, prepared: Prepared, top_heads: int
) -> estimate.Run:
    """The estimate's run of what is measured: this shape, these tokens, these heads."""
    text = shape.text
    found = estimate.Shape(
        name=shape.name,
        layers=text.layers,
        heads=text.heads,
        kv_heads=text.kv_heads,
        hidden=text.hidden,
        ffn=text.ffn,
        weights=sum(weight.numel() for weight in model.parameters()),
        top_heads=top_heads,
        image_tokens=shape.image_tokens,
        vision_flops=vision_flops(shape, model),
    )
    pairs = prepared.pairs()
    prompt = round(statistics.mean(len(prompt) for prompt, _ in pairs))
    settings = argparse.Namespace(
        examples=len(prepared),
        batch_size=args.examples,
        text_tokens=prompt - shape.image_tokens,
        answer_tokens=round(statistics.mean(len(answer) for _, answer in pairs)),
        evaluated=top_heads / (text.layers * text.heads),
    )
    return estimate.Run(found, settings)


def vision_flops(shape: LlavaShape, model: Any) -> float:
    """Operations of one image through the vision tower: two for each weight and patch, of which one is the class's."""
    weights = sum(weight.numel() for name, weight in model.named_parameters() if "vision_tower" in name)
    return 2.0 * weights * (shape.image_tokens + 1)


def matmul_tflops(
    shape: LlavaShape, device: torch.device, dtype: str, tokens: int, clock: Callable[[], float]
) -> float:
    """Operations per second, 1e12, of the product of so many tokens (4,096 on a CPU) with an FFN's weight: the best."""
    rows = tokens if device.type == "cuda" else min(tokens, 4096)
    weight, x = (
        torch.randn(size, shape.text.hidden, device=device).to(getattr(torch, dtype)) for size in (shape.text.ffn, rows)
    )
    repeats = 10

    def products() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(x, weight)

    products()
    seconds = min(timed(products, clock) for _ in range(5)) / repeats
    return 2.0 * rows * shape.text.hidden * shape.text.ffn / seconds / 1e12


# Tables -------------------------------------------------------------------------------------------


def machine_line(row: Mapping[str, Any]) -> str:
    """The machine for people."""
    memory = f", {row['memory_gib']:.0f} GiB, CUDA {row['cuda']}, sm {row['driver_capability']}" if row["cuda"] else ""
    versions = ", ".join(f"{name} {row[name]}" for name in ("python", "torch", "transformers", "hones_steer"))
    return f"{row['device']}{memory}, {row['cores']} cores, {row['threads']} threads, {row['dtype']}; {versions}"


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of tokens per second for people, as Markdown."""
    lines = ["| mode | layers | batch | phase | variant | tokens/s | ratio to unsteered | n | peak GiB |"]
    lines += ["|---|---:|---:|---|---|---:|---|---:|---:|"]
    for row in rows:
        mode = row["mode"] + (" (skipped by Inductor)" if row["mode"] == "graphs" and row["graphs_skipped"] else "")
        ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        what = f"{mode} | {row['layers']} | {row['batch']} | {row['phase']} | {row['variant']}"
        lines.append(f"| {what} | {row['tokens_per_s']:,.0f} | {ratio} | {row['n']} | {_gib(row)} |")
    return "\n".join(lines)


def attribution_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of attribution for people, as Markdown."""
    lines = [
        "| step | heads | examples | prompt | ms a head and example | estimate | over estimate | TFLOP/s "
        "| of a matmul's | n | peak GiB |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        of = row["heads"] * row["examples"]
        least, most = (f"{1000 * row[name] / of:.3g}" for name in ("seconds_min", "seconds_max"))
        times = f"{1000 * row['per_head_and_example']:.3g} ({least}–{most})"
        what = f"{row['step']} | {row['heads']} | {row['examples']} | {row['prompt']} | {times}"
        share = f"{row['utilisation']:.0%} of {row['matmul_tflops']:.3g}"
        against = f"{1000 * row['estimate']:.3g} | {row['over_estimate']:.2f}"
        lines.append(f"| {what} | {against} | {row['tflops']:.3g} | {share} | {row['n']} | {_gib(row)} |")
    return "\n".join(lines)


def _gib(row: Mapping[str, Any]) -> str:
    return "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows for people."""
    by_part = {part: [row for row in rows if row["part"] == part] for part in ("machine", "runtime", "attribution")}
    shown = [machine_line(by_part["machine"][0]), speed_table(by_part["runtime"])]
    if by_part["attribution"]:
        shown.append(attribution_table(by_part["attribution"]))
    return "\n\n".join(shown)


if __name__ == "__main__":
    sys.exit(main())
