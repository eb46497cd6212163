"""Head scores: how much a task loses when one attention head's output is replaced (HONES, arXiv 2604.17941, 3.1).

1. The task's items, examples or (prompt, answer) pairs, are put in batches (`ScoredItems`).
2. For each batch, statistics [items, k] are taken with every head in place and with each head replaced (`ablation.py`);
   some heads on one batch are a step, which a run folder keeps and one process does.
3. The statistics of all items make up the utility P, and a head's score is how much of it is lost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from hones_offline.attribution.ablation import HeadAblation
from hones_offline.attribution.generated import GeneratedText, batches_at_once
from hones_offline.attribution.measurements import AnswerLogProbability, YesNoMargins
from hones_offline.data.metrics import FloatArray, mean_of_rows
from hones_offline.running.batching import batches
from hones_offline.running.evaluation import most_candidates
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import Head
from hones_offline.running.progress import progress_bar
from hones_offline.running.prompts import Prepared
from hones_steer.errors import DataError, LayoutError
from hones_steer.layout import DecoderLayer, Layout

HeadMetric = Literal["task", "logprob"]
HeadSearch = Literal["exact", "race", "patch"]
HeadWeights = Literal["score", "rank"]
WeightedHead = tuple[int, int, float]
"""(layer, head, weight)."""
_ROWS = 4096  # (head, item) pairs of a step: enough to decode together, few enough to lose when a run is killed


def head_count(layer: DecoderLayer) -> int:
    """The number of a layer's attention heads, 0 for a layer without attention.

    Raises LayoutError if there is no other head to replace one by.
    """
    if layer.attn_out is None:
        return 0
    if layer.num_heads is None or layer.num_heads < 2:
        raise LayoutError(
            f"layer {layer.index} has {layer.num_heads} attention head(s); replacing one by the others needs two"
        )
    return layer.num_heads


def require_replaceable_heads(layout: Layout) -> None:
    """Raise LayoutError, naming the layer, if a layer has no second head to replace one by."""
    for layer in layout.layers:
        head_count(layer)


@dataclass(frozen=True)
class Race:
    """The evaluations that racing saved, and at what risk."""

    error: float
    """The probability, at most and approximately, that the heads differ from those of exact scoring."""
    evaluations: int
    """Head × item evaluations run."""
    of: int
    """Head × item evaluations that exact scoring would run."""
    finished: int
    """Number of heads that were run on all items."""


@dataclass(frozen=True)
class Preselection:
    """The evaluations that attribution patching saved."""

    margin: float
    """How many heads more than are wanted were run, as a share of the number wanted."""
    pairs: int
    """(prompt, answer) pairs that the heads were estimated on, two forward and backward passes of each."""
    evaluations: int
    """Head × item evaluations run."""
    of: int
    """Head × item evaluations that exact scoring would run."""
    finished: int
    """Number of heads that were run on all items."""
    metric: str = "log-probability"
    """The measure that is estimated, also where heads are scored by the task's metric."""


@dataclass(frozen=True)
class HeadScores:
    """The score of every attention head: how much replacing it costs a task."""

    base: float
    """P(θ), the utility of the untouched model: the task's metric, or the mean log-probability of the answers."""
    by_head: npt.NDArray[np.float32]
    """S(h), float32 [L, H], NaN where a layer has fewer heads or none; [0, 0] for a method without heads."""
    finished: npt.NDArray[np.bool_] | None = None
    """Where not all were, which heads were run on all items, [L, H]; the scores of the others are estimates."""
    race: Race | None = None
    preselection: Preselection | None = None

    @classmethod
    def none(cls, base: float) -> "HeadScores":
        """No scores, for a method without heads."""
        return cls(base, np.zeros((0, 0), dtype=np.float32))


class Statistics(Protocol):
    """Statistics of some items, float64 [items, k], with every head in place and with heads replaced."""

    def undisturbed(self) -> FloatArray:
        """The statistics with every head in place."""

    def ablated(self, heads: Sequence[Head]) -> list[FloatArray]:
        """The statistics with each of `heads` replaced."""


class ScoredItems:
    """The items that heads are scored on: the examples, or for log-probabilities their (prompt, answer) pairs."""

    def __init__(self, prepared: Prepared, head_metric: HeadMetric, execution: Execution) -> None:
        self.prepared, self.execution = prepared, execution
        self.pairs = prepared.pairs() if head_metric == "logprob" else None

    def batches(self, among: Sequence[int] | None = None) -> list[list[int]]:
        """The items, or those `among` them, as numbers in batches of similar length."""
        rows = self.execution.batch_size
        if self.pairs is not None:
            lengths = [len(prompt) + len(answer) for prompt, answer in self.pairs]
        else:
            lengths = [len(encoded.shared) for encoded in self.prepared.encoded]
            if self.prepared.task.kind == "rank":
                rows = max(1, rows // most_candidates(self.prepared))
            else:
                rows *= batches_at_once(self.prepared, self.execution)
        among = range(len(lengths)) if among is None else among
        return [[among[i] for i in chosen] for chosen in batches([lengths[i] for i in among], rows)]

    def statistics(self, items: Sequence[int]) -> Statistics:
        """The statistics of the items with these numbers; answers to be generated are generated once right away."""
        prepared, execution = self.prepared, self.execution
        if self.pairs is not None:
            pairs = [self.pairs[i] for i in items]
            return HeadAblation(prepared.decoder, AnswerLogProbability(prepared, pairs, execution), execution)
        if prepared.task.kind == "rank":
            return HeadAblation(prepared.decoder, YesNoMargins(prepared, items, execution), execution)
        return GeneratedText(prepared, items, execution)


def all_heads(prepared: Prepared) -> list[list[Head]]:
    """Every head, by layer; a layer without attention has none."""
    return [[(layer.index, head) for head in range(head_count(layer))] for layer in prepared.decoder.layout.layers]


def heads_shape(prepared: Prepared) -> tuple[int, int]:
    """[L, H]: the number of layers, and of the heads of a layer that has most."""
    heads = all_heads(prepared)
    return len(heads), max(map(len, heads))


def head_statistics(prepared: Prepared, head_metric: HeadMetric, execution: Execution) -> tuple[FloatArray, FloatArray]:
    """Every item's statistics: with all heads in place [items, k], and with each replaced [L, H, items, k].

    They are NaN where a layer has fewer than H heads.
    """
    base, replaced = statistics_of(prepared, head_metric, all_heads(prepared), execution)
    table = np.full((*heads_shape(prepared), *base.shape), np.nan)
    for layer, of_layer in enumerate(replaced):
        table[layer, : len(of_layer)] = of_layer
    return base, table


def base_statistics(prepared: Prepared, head_metric: HeadMetric, execution: Execution) -> FloatArray:
    """Every item's statistics with all heads in place, [items, k], in the order in which batches take the items.

    The process that calls this computes all of them, and keeps them in no run folder.
    """
    scored = ScoredItems(prepared, head_metric, execution)
    return np.concatenate([scored.statistics(items).undisturbed() for items in scored.batches()])


def statistics_of(
    prepared: Prepared,
    head_metric: HeadMetric,
    heads: Sequence[Sequence[Head]],
    execution: Execution,
    *,
    among: Sequence[int] | None = None,
    step: str = "heads",
) -> tuple[FloatArray, list[FloatArray]]:
    """The items' statistics: with all heads in place [items, k], and with each of a layer's `heads` replaced.

    The latter are [heads, items, k] for each layer. The items are those `among`, in ascending order, or all. A few
    layers' heads on some items are one resumable step, whose name begins with `step`. Each process does some of the
    steps, which are the same for any number of them, and all have all results.
    """
    scored, processes = ScoredItems(prepared, head_metric, execution), execution.processes
    item_batches = scored.batches(among)
    blocks = _blocks(heads, max(map(len, item_batches)))
    parts = processes.parts(len(item_batches), len(blocks))

    def mine(number: int, block: int) -> bool:  # costs fall with the layer, so parts take turns at blocks
        return processes.owns(number * parts + block % parts)

    total = sum(
        len(of_block) * len(items)
        for number, items in enumerate(item_batches)
        for block, of_block in enumerate(blocks)
        if mine(number, block)
    )
    computed: dict[tuple[str, int, int], FloatArray] = {}
    with progress_bar(f"{prepared.task.name}: {step}", total, show=execution.shows_progress) as bar:
        for number, items in enumerate(item_batches):
            opened = cache(partial(scored.statistics, items))  # for the first step that the run folder does not hold
            if mine(number, 0):
                computed["base", number, 0] = _step(execution, f"{step}-{number:05d}-base", opened)
            for block, of_block in enumerate(blocks):
                if mine(number, block):
                    name = f"{step}-{number:05d}-{block:03d}-of-{len(blocks):03d}"
                    computed["replaced", number, block] = _step(execution, name, opened, of_block)
                    bar.update(len(of_block) * len(items))
    shared = {key: value for of_process in processes.share(computed) for key, value in of_process.items()}

    def joined(kind: str, block: int) -> FloatArray:
        return np.concatenate([shared[kind, number, block] for number in range(len(item_batches))], axis=-2)

    ascending = np.argsort(np.concatenate(item_batches))
    replaced = np.concatenate([joined("replaced", block) for block in range(len(blocks))])[:, ascending]
    return joined("base", 0)[ascending], np.split(replaced, np.cumsum([len(of_layer) for of_layer in heads])[:-1])


def _blocks(heads: Sequence[Sequence[Head]], items: int) -> list[list[Head]]:
    """Heads of whole layers, together until they make `_ROWS` (head, item) rows: many rows decode together."""
    blocks: list[list[Head]] = [[]]
    for of_layer in heads:
        if len(blocks[-1]) * items >= _ROWS:
            blocks.append([])
        blocks[-1] += of_layer
    return [block for block in blocks if block]


def _step(
    execution: Execution, name: str, opened: Callable[[], Statistics], heads: Sequence[Head] | None = None
) -> FloatArray:
    """A step: statistics with every head in place [items, k], or with each of `heads` replaced [heads, items, k]."""

    def compute() -> dict[str, FloatArray]:
        return {"statistics": opened().undisturbed() if heads is None else np.stack(opened().ablated(heads))}

    return execution.arrays(name, compute)["statistics"]


def head_scores(prepared: Prepared, head_metric: HeadMetric, base: FloatArray, replaced: FloatArray) -> HeadScores:
    """Utility P(θ) and scores S(h) = P(θ) − P(θ_Ih), from `head_statistics` of all items or of some."""
    whole = utility(prepared, head_metric, base)
    scores = np.full(replaced.shape[:2], np.nan, dtype=np.float32)
    for index in np.argwhere(~np.isnan(replaced).any(axis=(2, 3))):
        scores[tuple(index)] = whole - utility(prepared, head_metric, replaced[tuple(index)])
    return HeadScores(whole, scores)


def utility(prepared: Prepared, head_metric: HeadMetric, statistics: FloatArray) -> float:
    """Utility P: the task's metric, or the mean log-probability of the answers, from all items' rows [items, k]."""
    aggregate = mean_of_rows if head_metric == "logprob" else prepared.task.aggregate
    return float(aggregate(statistics.sum(axis=0), len(statistics)))


def top_heads(scores: npt.NDArray[np.float32], count: int) -> list[WeightedHead]:
    """The `count` heads with the highest scores that are positive, as (layer, head, weight), weight = max(S, 0).

    Heads with a score of zero or less have no weight in the importance, so they are left out.

    Raises:
        DataError: no head has a positive score.
    """
    order = np.argsort(-scores.reshape(-1), kind="stable")[:count]
    heads = [(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in order]
    chosen = [(layer, head, float(scores[layer, head])) for layer, head in heads if scores[layer, head] > 0]
    if not chosen:
        raise DataError("replacing a head never lowers the task's utility; use more examples or head_metric='logprob'")
    return chosen


def weigh(heads: Sequence[WeightedHead], weights: HeadWeights) -> list[WeightedHead]:
    """Heads, strongest first, weighted by their scores as they come, or by "rank": (K − r) / K for r = 0 … K − 1."""
    if weights == "score":
        return list(heads)
    return [(layer, head, 1 - rank / len(heads)) for rank, (layer, head, _) in enumerate(heads)]
