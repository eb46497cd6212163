"""Head scores: how much a task loses when one attention head's output is replaced (paper section 3.1, design 2.1)."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from hones_offline.attribution.ablation import Generation, HeadRuns, LogProbabilities, Ranking
from hones_offline.data.metrics import FloatArray, mean_of_rows
from hones_offline.running.decoder import batches
from hones_offline.running.evaluation import most_candidates
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import Head
from hones_offline.running.progress import progress_bar
from hones_offline.running.prompts import Prepared
from hones_steer.errors import DataError, LayoutError
from hones_steer.layout import DecoderLayer

HeadMetric = Literal["task", "logprob"]
_ROWS = 4096  # (head, item) pairs of a step: enough to decode together, few enough to lose when a run is killed


def head_count(layer: DecoderLayer) -> int:
    """How many attention heads a layer has; raises LayoutError if there is no other to replace one by."""
    if layer.num_heads is None or layer.num_heads < 2:
        raise LayoutError(
            f"layer {layer.index} has {layer.num_heads} attention head(s); replacing one by the others needs two"
        )
    return layer.num_heads


def head_runs(
    prepared: Prepared, head_metric: HeadMetric, execution: Execution, among: Sequence[int] | None = None
) -> Iterator[tuple[list[int], Callable[[], HeadRuns]]]:
    """The task's items, a few at a time, each in exactly one result; nothing runs before these are called.

    Items are the examples, or for log-probabilities the (prompt, answer) pairs; with them come their numbers. Only the
    items `among` are run where that is given.
    """
    batch_size = execution.batch_size
    if head_metric == "logprob":
        pairs = prepared.pairs()
        for items in _batches_among([len(prompt) + len(answer) for prompt, answer in pairs], batch_size, among):
            yield items, cache(partial(LogProbabilities, prepared, [pairs[i] for i in items], execution))
        return
    kind: type[Ranking | Generation]
    if prepared.task.kind == "rank":
        kind, rows = Ranking, max(1, batch_size // most_candidates(prepared))
    else:
        kind, rows = Generation, batch_size * Generation.batches_at_once(prepared, execution)
    for items in _batches_among([len(encoded.shared) for encoded in prepared.encoded], rows, among):
        yield items, cache(partial(kind, prepared, items, execution))


def _batches_among(lengths: Sequence[int], rows: int, among: Sequence[int] | None) -> Iterator[list[int]]:
    among = range(len(lengths)) if among is None else among
    for chosen in batches([lengths[i] for i in among], rows):
        yield [among[i] for i in chosen]


def all_heads(prepared: Prepared) -> list[list[Head]]:
    """Every head, by layer."""
    return [[(layer.index, head) for head in range(head_count(layer))] for layer in prepared.decoder.layout.layers]


def head_statistics(prepared: Prepared, head_metric: HeadMetric, execution: Execution) -> tuple[FloatArray, FloatArray]:
    """Every item's statistics: with all heads in place [items, k], and with each replaced [L, H, items, k]."""
    base, replaced = statistics_of(prepared, head_metric, all_heads(prepared), execution)
    return base, np.stack(replaced)


def base_statistics(prepared: Prepared, head_metric: HeadMetric, execution: Execution) -> FloatArray:
    """Every item's statistics with all heads in place, [items, k], in the order in which batches take the items.

    The process that calls this computes all of them, and keeps them in no run folder.
    """
    return np.concatenate([runs().base() for _, runs in head_runs(prepared, head_metric, execution)])


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

    These are [heads, items, k] for each layer. The items are those `among`, in ascending order, or all. A few layers'
    heads on some items are one resumable step, whose name begins with `step`. Each process does some of the steps,
    which are the same for any number of them, and all have all results.
    """
    processes = execution.processes
    chosen = [items for items, _ in head_runs(prepared, head_metric, execution, among)]
    blocks = _blocks(heads, max(map(len, chosen)))
    parts = processes.parts(len(chosen), len(blocks))

    def mine(number: int, block: int) -> bool:  # costs fall with the layer, so parts take turns at blocks
        return processes.owns(number * parts + block % parts)

    total = sum(
        len(of_block) * len(items)
        for number, items in enumerate(chosen)
        for block, of_block in enumerate(blocks)
        if mine(number, block)
    )
    own: dict[tuple[str, int, int], FloatArray] = {}
    with progress_bar(f"{prepared.task.name}: {step}", total, show=execution.progress and processes.rank == 0) as bar:
        for number, (_, runs) in enumerate(head_runs(prepared, head_metric, execution, among)):
            if mine(number, 0):
                own["base", number, 0] = _statistics(execution, f"{step}-{number:05d}-base", runs)
            for block, of_block in enumerate(blocks):
                if mine(number, block):
                    name = f"{step}-{number:05d}-{block:03d}-of-{len(blocks):03d}"
                    some = _statistics(execution, name, runs, of_block)
                    own["replaced", number, block] = some
                    bar.update(some.shape[0] * some.shape[1])
    found = {key: value for of_process in processes.share(own) for key, value in of_process.items()}

    def joined(kind: str, block: int) -> FloatArray:
        return np.concatenate([found[kind, number, block] for number in range(len(chosen))], axis=-2)

    ascending = np.argsort(np.concatenate(chosen))
    replaced = np.concatenate([joined("replaced", block) for block in range(len(blocks))])[:, ascending]
    return joined("base", 0)[ascending], np.split(replaced, np.cumsum([len(of_layer) for of_layer in heads])[:-1])


def _blocks(heads: Sequence[Sequence[Head]], items: int) -> list[list[Head]]:
    """Whole layers' heads, together until they make `_ROWS` (head, item) rows: many rows decode together."""
    blocks: list[list[Head]] = [[]]
    for of_layer in heads:
        if len(blocks[-1]) * items >= _ROWS:
            blocks.append([])
        blocks[-1] += of_layer
    return [block for block in blocks if block]


def _statistics(
    execution: Execution, step: str, runs: Callable[[], HeadRuns], heads: Sequence[Head] | None = None
) -> FloatArray:
    """[items, k] with every head in place, or [heads, items, k] with each replaced: a step of the run."""

    def compute() -> dict[str, FloatArray]:
        return {"statistics": runs().base() if heads is None else np.stack(runs().results(heads))}

    return execution.arrays(step, compute)["statistics"]


def head_scores(
    prepared: Prepared, head_metric: HeadMetric, base: FloatArray, replaced: FloatArray
) -> tuple[float, npt.NDArray[np.float32]]:
    """P(θ), and S(h) = P(θ) − P(θ_Ih) for every head, [L, H], from `head_statistics` of all items or of some."""
    whole = utility(prepared, head_metric, base)
    scores = [[whole - utility(prepared, head_metric, head) for head in layer] for layer in replaced]
    return whole, np.array(scores, dtype=np.float32)


def utility(prepared: Prepared, head_metric: HeadMetric, statistics: FloatArray) -> float:
    """P: the task's metric, or the mean log-probability of the answers, from the rows [items, k] of all items."""
    aggregate = mean_of_rows if head_metric == "logprob" else prepared.task.aggregate
    return float(aggregate(statistics.sum(axis=0), len(statistics)))


def top_heads(scores: npt.NDArray[np.float32], count: int) -> list[tuple[int, int, float]]:
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
