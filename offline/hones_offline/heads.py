"""Head scores: how much a task loses when one attention head's output is replaced (paper section 3.1, design 2.1)."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from hones_offline.decoding import batches
from hones_offline.evaluate import most_candidates
from hones_offline.interventions import Generation, HeadRuns, LogProbabilities, Ranking
from hones_offline.metrics import FloatArray, mean_of_rows
from hones_offline.prompts import Prepared
from hones_steer.errors import DataError, LayoutError
from hones_steer.layout import DecoderLayer

HeadMetric = Literal["task", "logprob"]


def head_count(layer: DecoderLayer) -> int:
    """How many attention heads a layer has; raises LayoutError if there is no other to replace one by."""
    if layer.num_heads is None or layer.num_heads < 2:
        raise LayoutError(
            f"layer {layer.index} has {layer.num_heads} attention head(s); replacing one by the others needs two"
        )
    return layer.num_heads


def head_runs(
    prepared: Prepared, head_metric: HeadMetric, *, batch_size: int, memory_gb: float
) -> Iterator[Callable[[], HeadRuns]]:
    """The task's examples, a few at a time, each in exactly one result; nothing runs before these are called."""
    options = {"batch_size": batch_size, "memory_gb": memory_gb}
    if head_metric == "logprob":
        pairs = prepared.pairs()
        for items in batches([len(prompt) + len(answer) for prompt, answer in pairs], batch_size):
            yield cache(partial(LogProbabilities, prepared, [pairs[i] for i in items], **options))
        return
    kind: type[Ranking | Generation]
    kind, rows = Generation, batch_size
    if prepared.task.kind == "rank":
        kind, rows = Ranking, max(1, batch_size // most_candidates(prepared))
    for items in batches([len(encoded.shared) for encoded in prepared.encoded], rows):
        yield cache(partial(kind, prepared, items, **options))


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
