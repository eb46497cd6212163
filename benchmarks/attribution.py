"""Speed of attribution: against doing it plainly, and against the least that has to be computed.

    .venv/bin/python benchmarks/attribution.py

(an hour or more on one quiet core; --models and --examples make it less) attributes a few examples on three models and
prints, for each,

    speedup        the plain twin's time / ours. The twin is tests/reference.py: one example at a time, whole model
                   forwards with KV cache and without gradients, processor and vision tower in each of them
    limit_speedup  the same if ours took no more than the limit
    over_limit     our time / the limit
    over_layers    our time / the part of the limit that decoder layers take, the unembedding left out

The limit is the layer-forwards that cannot be avoided times the best time of one. A head of layer l needs the layers
from l on, for the prompt and for the answer as far as it is the undisturbed one: all these tokens are known, which is
prefill; a prefix that all prompts share counts once. Every further token needs all layers, one token at a time:
decode. The unembedding is a layer, too, for each token of an answer that has to be chosen or whose probability has to
be known. The best time of one is that of the model's own layers, called one after another on unpadded copies of the
middle-sized sequence (to decode, after as many tokens as are there on average), at the batch size that is best,
prefill, decode and unembedding apart. Embedding, vision tower, processor and scoring are not in the limit.

Everything is interleaved: each round runs ours whole, a share of the twin's heads, and the layers alone. Over the
rounds the twin scores every head of the embedded VLM once, of the larger models an even sample of heads, from which the
time of all is extrapolated (`--twin-heads`). How far its scores are from ours is part of the result. Its importance, a
few heads' more, is computed from its scores, with ours for heads that it did not score, and timed once. Given are the
rounds' medians and extremes. The clock is the process's CPU time, or with more than one thread (`--threads`) the
wall's. glibc is told to keep freed memory, as the `hones` commands tell it.

With `--ways`, instead: whole attributions by log-probability, encoding left out, in turn on the same examples. They are
HONES with every head on every example, with a race and with preselected heads, and the methods without heads that run
backward. Time is given as a share of the first one's in the same round, beside the evaluations left, the share of the
first one's best heads that were found, and the overlap (Jaccard) of the banks.

The models: the embedded VLM; SmolLM2-135M (`--smollm2 DIR` with a checkpoint, else random weights of its shape); a
random LLaVA of 16 layers, hidden size 512, 256 image tokens. Answers of the last two are what the model itself writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import reference
import tiny_models
import tiny_processors
from hones_offline import attribute
from hones_offline.attribution.ablation import HeadAblation
from hones_offline.attribution.generated import DraftedAnswers
from hones_offline.attribution.measurements import AnswerLogProbability
from hones_offline.attribution.methods import AttributionOptions
from hones_offline.attribution.pipeline import find_bank
from hones_offline.attribution.write_in import WriteInSums
from hones_offline.data.examples import Example, MemoryImage, load_jsonl, scene_examples
from hones_offline.data.scenes import scenes
from hones_offline.data.tasks import JsonlTask, Task, get_task
from hones_offline.running.batching import Batch, Segment
from hones_offline.running.cache import new_cache, right_aligned
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import Head
from hones_offline.running.models import keep_freed_memory
from hones_offline.running.prompts import Prepared, prepare
from numpy.typing import NDArray
from PIL import Image
from problems import problem
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

TOP_FRACTION = 0.01
MOST_TOKENS = 4096  # of a batch in which layers are timed
MOST_CACHED = 65536  # of one in which they decode
MOST_LOGITS = 2**26  # of one that is unembedded
Tokens = list[int]
CAPITALS = Path(__file__).resolve().parents[1] / "examples/smollm2/data/discovery/capitals.jsonl"


@dataclass(frozen=True)
class Case:
    """One model and task."""

    name: str
    model: Any
    processor: Any
    task: Task
    examples: list[Example]
    metrics: tuple[str, ...] = ("task", "logprob")
    top_heads: int = 8
    twin_heads: int | None = None
    """How many heads the twin scores (all)."""

    def arguments(self) -> tuple[Any, Any, Task, list[Example]]:
        """The first arguments of `attribute` and of the reference's functions."""
        return self.model, self.processor, self.task, self.examples


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    cases = QUICK if args.quick else {name: CASES[name] for name in args.models}
    rows = []
    for build in cases.values():
        case = build(args)
        case = replace(case, twin_heads=args.twin_heads or case.twin_heads)
        if args.ways:
            rows += compared_ways(case, 1 if args.quick else args.repeats)
            print(ways_table(rows), file=sys.stderr, flush=True)
            continue
        for metric in case.metrics:
            measured = measure(case, metric, modes(case, metric, args.race), 1 if args.quick else args.repeats)
            rows += measured
            print(table(measured), file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=1) if args.json else (ways_table if args.ways else table)(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Speed of attribution: against a plain twin, and against the least that has to be computed.",
        epilog="The top of this file says how it is measured. Close everything else: the others' work is noise here.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of a table")
    parser.add_argument("--quick", action="store_true", help="tiny models and one round: does it run?")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds per row (default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch (default: 1)")
    parser.add_argument("--examples", type=int, metavar="N", help="per case (default: as many as take minutes)")
    parser.add_argument("--twin-heads", type=int, metavar="N", help="that the twin scores (as many as take minutes)")
    parser.add_argument("--models", nargs="+", choices=sorted(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--race", action="store_true", help="also rows with racing heads; needs 64 examples or more")
    parser.add_argument("--ways", action="store_true", help="instead: exact heads, races, preselection, gradients")
    parser.add_argument("--smollm2", type=Path, metavar="DIR", help="SmolLM2-135M (default: random weights)")
    return parser


# Cases --------------------------------------------------------------------------------------------


def embedded(args: argparse.Namespace, task: str) -> Case:
    """The shipped model on generated scenes."""
    model, processor = load_tiny_vlm()
    examples = scene_examples(task, scenes("discovery", args.examples or 48))
    return Case(f"tiny-vlm {task}", model, processor, get_task(task), examples)


def smollm2(args: argparse.Namespace) -> Case:
    """A text model at a realistic size."""
    if args.smollm2:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.smollm2, dtype=torch.float32).eval()
        processor = AutoTokenizer.from_pretrained(args.smollm2)
        processor.chat_template = None
    else:
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
        model = LlamaForCausalLM(LlamaConfig(**{**tiny_models.TEXT, **shape, **heads, "vocab_size": 49_152})).eval()
        randomize(model)
        processor = tiny_processors.text_tokenizer(model.config)
    examples = list(load_jsonl(CAPITALS).examples[: args.examples])
    task = JsonlTask("capitals", "exact_match", 8)
    case = Case("smollm2-135m capitals", model, processor, task, examples, twin_heads=15)
    return case if args.smollm2 else own_answers(case)


def llava(args: argparse.Namespace) -> Case:
    """A random LLaVA with as many image tokens as LLaVA-1.5 has at half its resolution."""
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "max_position_embeddings": 1024}
    config = LlavaConfig(
        text_config=LlamaConfig(**{**tiny_models.TEXT, **text, "num_attention_heads": 8, "vocab_size": 8192}),
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=224,
            patch_size=14,
        ),
        image_token_id=tiny_models.IMAGE,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    randomize(model)
    rng = np.random.default_rng(0)
    examples = []
    for i in range(args.examples or 2):
        image = MemoryImage(Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)), f"random-{i}")
        examples.append(Example(str(i), "what is the color of the square on the left", ("?",), image))
    processor = tiny_processors.llava_processor(config)
    task = JsonlTask("colors", "anls", 8)
    return own_answers(Case("llava-16x512", model, processor, task, examples, twin_heads=32))


def quick(architecture: str, task: str) -> Case:
    """A tiny model of the tests."""
    p = problem(architecture, task, count=3)
    return own_answers(Case(f"{architecture} {task}", p.model, p.processor, JsonlTask("text", "anls", 6), p.examples))


def randomize(model: torch.nn.Module) -> None:
    """Weights of unit gain from a fixed seed; the generation ends with token 2."""
    tiny_models._randomise(model, 0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0


def own_answers(case: Case) -> Case:
    """The case with what the model writes as targets, so that a replaced head can only make it worse."""
    texts = reference.outputs(*case.arguments())
    examples = [replace(e, targets=(text or "a",)) for e, text in zip(case.examples, texts, strict=True)]
    return replace(case, examples=examples)


CASES: Mapping[str, Callable[[argparse.Namespace], Case]] = {
    "tiny-vlm-vqa": lambda args: embedded(args, "vqa"),
    "tiny-vlm-caption": lambda args: embedded(args, "caption"),
    "smollm2": smollm2,
    "llava": llava,
}
QUICK: Mapping[str, Callable[[argparse.Namespace], Case]] = {
    "llama": lambda _: quick("llama", "text"),
    "llava": lambda _: quick("llava", "vqa"),
}


# One row ------------------------------------------------------------------------------------------


def modes(case: Case, metric: str, race: bool) -> list[str]:
    """How heads are scored; those of a metric that is no mean over examples cannot race."""
    return ["exact", "race"] if race and (metric == "logprob" or case.task.metric != "BLEU-4") else ["exact"]


def measure(case: Case, metric: str, modes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Ours in each mode, the twin and the limit, in turn; a row for each mode."""
    prepared = prepare(*case.arguments())
    twin = Twin(case, metric)
    batch_size = LayerTimes(prepared, metric).batch_size
    ours: dict[str, list[float]] = {mode: [] for mode in modes}
    layers: dict[str, list[float]] = {mode: [] for mode in modes}
    limit: dict[str, list[float]] = {mode: [] for mode in modes}
    attributions, plain = {}, []
    for number in range(rounds):
        needed = {}
        for mode in modes:
            with recorded() as work:
                start = clock()
                attributions[mode] = attribute(
                    *case.arguments(),
                    method="hones",
                    top_heads=case.top_heads,
                    top_fraction=TOP_FRACTION,
                    head_metric=metric,  # type: ignore[arg-type]
                    heads=mode,  # type: ignore[arg-type]
                    batch_size=batch_size,
                )
                ours[mode].append(clock() - start)
            needed[mode] = least(prepared, work)
        plain.append(twin.score_heads(number, rounds))
        times = LayerTimes(prepared, metric, needed[modes[0]].context)
        for mode, minimum in needed.items():
            layers[mode].append(minimum.prefill * times.prefill + minimum.decode * times.decode)
            limit[mode].append(layers[mode][-1] + minimum.unembedded * times.unembedding)
    scores, score_error = twin.compared(attributions["exact"].head_scores)
    importance, seconds = twin.importance(scores, case.top_heads)
    plain = [scoring + seconds for scoring in plain]
    bank = replace(attributions["exact"].importance, values=importance.reshape(-1)).bank(TOP_FRACTION)
    return [
        {
            "model": case.name,
            "metric": metric,
            "mode": mode,
            "evaluated": race.evaluations / race.of if (race := attributions[mode].race) else 1.0,
            **spread("speedup", plain, ours[mode]),
            **spread("limit_speedup", plain, limit[mode]),
            **spread("over_limit", ours[mode], limit[mode]),
            **spread("over_layers", ours[mode], layers[mode]),
            "same_bank": attributions[mode].bank.pairs() == bank.pairs(),
            "score_error": score_error,
            "importance_error": float(
                np.abs(np.asarray(attributions[mode].importance) - importance).max() / importance.max()
            ),
            "seconds": statistics.median(ours[mode]),
            "twin_seconds": statistics.median(plain),
            "limit_seconds": statistics.median(limit[mode]),
            "n": len(prepared),
            "heads": len(twin.heads),
            "twin_heads": len(twin.scores),
            "batch_size": batch_size,
            "rounds": rounds,
        }
        for mode in modes
    ]


EXACT = AttributionOptions("hones", head_metric="logprob", top_fraction=TOP_FRACTION)
WAYS: Mapping[str, AttributionOptions] = {
    "hones": EXACT,
    "hones, race": replace(EXACT, heads="race"),
    "hones, patch": replace(EXACT, heads="patch"),
    "grad_all": replace(EXACT, method="grad_all"),
    "fisher": replace(EXACT, method="fisher"),
}


def compared_ways(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row for each of `WAYS`, measured in turn."""
    prepared = prepare(*case.arguments())
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    found = {}
    for _ in range(rounds):
        for name, options in WAYS.items():
            sized = replace(options, top_heads=case.top_heads) if options.entry.guided else options
            start = clock()
            found[name] = find_bank(prepared, sized, Execution())
            seconds[name].append(clock() - start)
    exact = found["hones"]
    heads, neurons = {head[:2] for head in exact.heads}, set(exact.bank.pairs())
    rows = []
    for name, attribution in found.items():
        costs, guided = attribution.race or attribution.preselection, WAYS[name].entry.guided
        own = set(attribution.bank.pairs())
        rows.append(
            {
                "model": case.name,
                "way": name,
                **spread("time", seconds[name], seconds["hones"]),
                "evaluated": (costs.evaluations / costs.of if costs else 1.0) if guided else None,
                "recall": len(heads & {head[:2] for head in attribution.heads}) / len(heads) if guided else None,
                "overlap": len(neurons & own) / len(neurons | own),
                "seconds": statistics.median(seconds[name]),
                "n": len(prepared),
                "top_heads": len(heads),
                "rounds": rounds,
            }
        )
    return rows


def ways_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `compared_ways` for people, as Markdown."""
    lines = [
        "| model | way | time | evaluations left | heads found | banks' overlap | n | heads | s |",
        "|---|---|---|---|---|---|---:|---:|---:|",
    ]
    for row in rows:
        time_ = f"{row['time']:.2f} ({row['time_min']:.2f}–{row['time_max']:.2f})"
        of_heads = [f"{row[name]:.0%}" if row[name] is not None else "–" for name in ("evaluated", "recall")]
        numbers = f"{row['overlap']:.2f} | {row['n']} | {row['top_heads']} | {row['seconds']:.1f}"
        lines.append(f"| {row['model']} | {row['way']} | {time_} | {' | '.join(of_heads)} | {numbers} |")
    return "\n".join(lines)


def clock() -> float:
    """Seconds: CPU time with one thread, in which others' work on the machine counts less; else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def spread(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of the rounds' ratios."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {name: statistics.median(ratios), f"{name}_min": min(ratios), f"{name}_max": max(ratios)}


class Twin:
    """The reference, its heads scored a share at a time."""

    def __init__(self, case: Case, metric: str) -> None:
        self.case = case
        self.utility = reference.metric if metric == "task" else reference.mean_log_probability
        layers = TextDecoder(case.model).layout.layers
        self.heads = [(layer.index, head) for layer in layers for head in range(layer.num_heads or 0)]
        count = min(case.twin_heads or len(self.heads), len(self.heads))
        self.sample = [self.heads[i * len(self.heads) // count] for i in range(count)]
        self.scores: dict[tuple[int, int], float] = {}
        start = clock()
        self.base = self.utility(*case.arguments())
        self.base_seconds = clock() - start

    def score_heads(self, number: int, rounds: int) -> float:
        """Score every `rounds`-th head of the sample; seconds that all heads would take."""
        share = self.sample[number::rounds]
        start = clock()
        for layer, head in share:
            with reference.head_replaced(self.case.model, layer, head):
                self.scores[layer, head] = self.base - self.utility(*self.case.arguments())
        return self.base_seconds + (clock() - start) * len(self.heads) / len(share)

    def compared(self, ours: NDArray[np.float32]) -> tuple[list[list[float]], float]:
        """S(h), [L][H], with `ours` for heads that the twin has not scored, and how far they are apart elsewhere."""
        scores = ours.astype(float)
        for head, score in self.scores.items():
            scores[head] = score
        return scores.tolist(), float(np.abs(scores - ours).max())

    def importance(self, scores: list[list[float]], top_heads: int) -> tuple[Any, float]:
        """The importance [L, I], and the seconds it took."""
        start = clock()
        with torch.no_grad():
            importance = reference.importance(*self.case.arguments(), scores, top_heads).float().numpy()
        return importance, clock() - start


# The limit ----------------------------------------------------------------------------------------


Measured = DraftedAnswers | AnswerLogProbability | WriteInSums
"""The measurements that the cases run: nothing here ranks."""


@dataclass
class Work:
    """The measurements that were run, with their heads and a result for each; for generated answers, their tokens."""

    runs: list[tuple[Measured, Sequence[Head], Sequence[Any]]] = field(default_factory=list)


@contextmanager
def recorded() -> Iterator[Work]:
    """Record what is run while the block runs."""
    work = Work()
    ablated = HeadAblation.ablated

    def record(self: HeadAblation[Any, Any], heads: Sequence[Head]) -> Any:
        results = ablated(self, heads)
        work.runs.append((self.measurement, heads, results))  # answers that are still to be decoded grow in place
        return results

    with patch.object(HeadAblation, "ablated", record):
        yield work


@dataclass(frozen=True)
class Least:
    """Layer-forwards of one token that cannot be avoided; `context` tokens are before one that is decoded."""

    prefill: int
    decode: int
    unembedded: int
    context: int


def least(prepared: Prepared, work: Work) -> Least:
    """The least that has to be computed for what `work` has found."""
    depth, budget = len(prepared.decoder.layout.layers), prepared.task.max_new_tokens
    prefill = decode = unembedded = context = 0
    counted: set[Any] = set()
    for measured, heads, _ in work.runs:
        shared, rest = fed(measured)
        answers = sum(map(len, measured.answers)) if isinstance(measured, AnswerLogProbability) else 0
        if not isinstance(measured, WriteInSums):  # whose undisturbed forward the head scores have had
            shared_once = 0 if "undisturbed" in counted else shared
            prefill += 0 if id(measured) in counted else depth * (shared_once + rest)
            unembedded += 0 if id(measured) in counted else answers
            counted |= {id(measured), "undisturbed"}
        for layer, head in heads:
            key = (type(measured), layer, head)
            prefill += (depth - layer) * (rest + (0 if key in counted else shared))
            unembedded += answers
            counted.add(key)
    generated = [(m, heads, answers) for m, heads, answers in work.runs if isinstance(m, DraftedAnswers)]
    for measured in {id(m): m for m, _, _ in generated}.values():
        for draft in measured.drafts:
            steps = _tokens(draft, budget) - 1
            unembedded += steps + 1
            decode += depth * steps
            context += depth * steps * steps // 2
    for measured, heads, answers in generated:
        for (layer, _), of_head in zip(heads, answers, strict=True):
            for draft, tokens in zip(measured.drafts, of_head, strict=True):
                shared = _shared(draft, tokens)
                prefill += (depth - layer) * min(shared, budget - 1)
                unembedded += _tokens(tokens, budget)
                if tokens != draft:
                    steps = _tokens(tokens, budget) - shared - 1
                    decode += depth * steps
                    context += depth * steps * (shared + steps // 2)
    lengths = [len(encoded.prompt(0)) for encoded in prepared.encoded]
    return Least(prefill, decode, unembedded, context // max(decode, 1) + int(statistics.median(lengths)))


def fed(measured: Measured) -> tuple[int, int]:
    """How many tokens each head's forward of the items must be fed: a prefix that they share, and the others."""
    buckets = measured.forwards.buckets if isinstance(measured, WriteInSums) else measured.buckets
    shared = buckets.batches[0].shared
    if isinstance(measured, DraftedAnswers):
        return shared, sum(int((drafted.prompts - shared).sum()) for drafted in measured.drafted)
    return shared, sum(int(batch.ends.sum()) for batch in buckets.batches)


def _tokens(tokens: Tokens, budget: int) -> int:
    """How many tokens were chosen: the end token is one, where there was room for it."""
    return len(tokens) + (len(tokens) < budget)


def _shared(a: Tokens, b: Tokens) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def sequences(prepared: Prepared, metric: str) -> list[Segment]:
    """The segments that one head's forwards are fed, generated tokens aside."""
    if metric == "task":
        return [encoded.prompt(0) for encoded in prepared.encoded]
    return [prepared.decoder.answered(prompt, answer) for prompt, answer in prepared.pairs()]


class LayerTimes:
    """Seconds of one layer for one token, and of the unembedding, at the best batch size."""

    @torch.no_grad()
    def __init__(self, prepared: Prepared, metric: str, context: int = 0) -> None:
        self.decoder = prepared.decoder
        rows = sorted(sequences(prepared, metric), key=len)
        self.segment = rows[len(rows) // 2]
        sizes = [2**i for i in range(10)]
        prefill = {size: self._prefill(size) for size in sizes if size * len(self.segment) <= MOST_TOKENS or size == 1}
        self.prefill = min(prefill.values())
        self.batch_size = max(size for size, seconds in prefill.items() if seconds < 1.05 * self.prefill)
        vocabulary = self.decoder.unembedding.weight.shape[0]
        self.unembedding = min(self._unembedding(size) for size in sizes if size * vocabulary <= MOST_LOGITS)
        self.decode = 0.0
        if context:
            self.decode = min(self._decode(size, context) for size in sizes if size * context <= MOST_CACHED)

    def _prefill(self, rows: int) -> float:
        batch = self.decoder.collate([self.segment] * rows)
        return self._seconds(self._calls(lambda: self.decoder.run(batch)), lambda: None) / batch.mask.numel()

    def _unembedding(self, rows: int) -> float:
        hidden = torch.randn(rows, self.segment.embeds.shape[1])
        return self._seconds([lambda: self.decoder.logits(hidden)], lambda: None) / rows

    def _decode(self, rows: int, context: int) -> float:
        before = self.decoder.continuation(self.segment, torch.zeros(context, dtype=torch.long))
        batch = self.decoder.collate([before.split(context)[0]])
        _, one = self.decoder.run(batch, new_cache())
        cache, mask = right_aligned(
            [(layer, torch.zeros(rows, dtype=torch.long)) for layer in one.layers], torch.full((rows,), context)
        )
        step = Batch(
            batch.embeds[:, -1:].repeat(rows, 1, 1),
            torch.cat([mask, mask[:, :1]], dim=1),
            batch.positions[:, :, -1:].repeat(1, rows, 1) + 1,
        )

        def crop() -> None:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :context], layer.values[:, :, :context]

        self.decoder.run(step, cache)  # from the second token on there is room
        crop()
        calls = self._calls(lambda: self.decoder.run(step, cache))
        return self._seconds(calls, crop) / rows

    def _calls(self, run: Callable[[], object]) -> list[Callable[[], object]]:
        """Each layer as the decoder calls it."""
        calls: list[Callable[[], object]] = []

        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(lambda: module.forward(*args, **kwargs))

        layers = self.decoder.layout.layers
        handles = [layer.module.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
        run()
        for handle in handles:
            handle.remove()
        return calls

    def _seconds(self, calls: Sequence[Callable[[], object]], before: Callable[[], None]) -> float:
        """Seconds of one call, the median of three rounds through all calls.

        Going through all of them has weights come from memory as they do in a forward.
        """
        seconds = []
        for _ in range(3):
            before()
            start = clock()
            for call in calls:
                call()
            seconds.append(clock() - start)
        return statistics.median(seconds) / len(calls)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people, as Markdown."""
    lines = [
        "| model | metric | mode | speedup | limit's speedup | over limit | over layers | bank | n | batch | ours, s |",
        "|---|---|---|---|---|---|---|---|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            f"{row[name]:.2f} ({row[name + '_min']:.2f}–{row[name + '_max']:.2f})"
            for name in ("speedup", "limit_speedup", "over_limit", "over_layers")
        ]
        error = max(row["score_error"], row["importance_error"])
        bank = f"{'yes' if row['same_bank'] else 'NO'} ({error:.0e})"
        numbers = f"{row['n']} | {row['batch_size']} | {row['seconds']:.1f}"
        lines.append(f"| {row['model']} | {row['metric']} | {row['mode']} | {' | '.join(cells)} | {bank} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
