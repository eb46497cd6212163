"""Head scores: how much a task loses when one attention head's output is replaced (paper section 3.1, design 2.1)."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from hones_offline.decoding import batches
from hones_offline.evaluate import mean_log_probability, most_candidates, score
from hones_offline.interventions import Generation, HeadRuns, LogProbabilities, Ranking
from hones_offline.metrics import FloatArray, mean_of_rows
from hones_offline.prompts import Prepared
from hones_steer.errors import DataError, LayoutError
from hones_steer.layout import DecoderLayer

HeadMetric = Literal["task", "logprob"]


def utility(prepared: Prepared, head_metric: HeadMetric, *, batch_size: int) -> float:
    """P(θ): the task's metric under greedy generation, or the mean log-probability of the answers."""
    if head_metric == "task":
        return score(prepared, batch_size=batch_size).value
    return mean_log_probability(prepared, batch_size=batch_size)


def head_count(layer: DecoderLayer) -> int:
    """How many attention heads a layer has; raises LayoutError if there is no other to replace one by."""
    if layer.num_heads is None or layer.num_heads < 2:
        raise LayoutError(
            f"layer {layer.index} has {layer.num_heads} attention head(s); replacing one by the others needs two"
        )
    return layer.num_heads


def head_runs(prepared: Prepared, head_metric: HeadMetric, *, batch_size: int, memory_gb: float) -> Iterator[HeadRuns]:
    """The task's examples, a few at a time; every item stands in exactly one of them."""
    options = {"batch_size": batch_size, "memory_gb": memory_gb}
    if head_metric == "logprob":
        lengths = [len(prompt) + len(answer) for prompt, answer in prepared.pairs()]
        yield from (LogProbabilities(prepared, items, **options) for items in batches(lengths, batch_size))
    elif prepared.task.kind == "rank":
        lengths = [len(encoded.shared) for encoded in prepared.encoded]
        at_once = max(1, batch_size // most_candidates(prepared))
        yield from (Ranking(prepared, items, **options) for items in batches(lengths, at_once))
    else:
        lengths = [len(encoded.shared) for encoded in prepared.encoded]
        yield from (Generation(prepared, items, **options) for items in batches(lengths, batch_size))


def head_scores(
    prepared: Prepared, base: float, statistics: Sequence[FloatArray], head_metric: HeadMetric
) -> list[float]:
    """S(h) = P(θ) − P(θ_Ih) for the heads of one layer, from their statistics [heads, items, k] of every run."""
    total = np.sum([rows.sum(axis=1) for rows in statistics], axis=0)
    items = sum(rows.shape[1] for rows in statistics)
    aggregate = mean_of_rows if head_metric == "logprob" else prepared.task.aggregate
    return [base - aggregate(row, items) for row in total]


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
