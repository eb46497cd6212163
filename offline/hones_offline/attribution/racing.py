"""Racing: the heads that matter most, from fewer evaluations than scoring every head on every item takes.

1. Items (examples, or (prompt, answer) pairs for log-probabilities) are drawn in random order without replacement, in
   rounds.
2. In each round the heads that are left run on the items drawn. A head's drop on an item is what the item's statistic
   loses when the head is replaced.
3. After each round a head is dropped if `keep` others beat it: their mean drop minus its own, on the items seen,
   exceeds what chance explains.
4. Heads that stay run on all items, so their scores equal those of exact scoring, and the best are chosen among them.

The heads can differ from those of exact scoring only if one of the best was dropped, because it wrongly appeared worse
than a head that is not better. The bound on that is Student's for the paired difference, with the correction for
drawing from finitely many items, at a level of error / (keep · heads · rounds): the union bound over a best head, any
other head and a round. It is approximate where a mean is not normal. It fails for a head that matters in so few
examples that the first round, an eighth of them, holds none; bounds that exclude this (Serfling's, with the range) drop
hardly a head below thousands of examples.
"""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from hones_offline.attribution.heads import (
    HeadMetric,
    HeadScores,
    Race,
    all_heads,
    heads_shape,
    statistics_of,
    utility,
)
from hones_offline.data.metrics import FloatArray
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared
from hones_steer.errors import DataError

FIRST_ROUND = 32
"""The least number of items in the first round: the spread of fewer says little."""


def race(
    prepared: Prepared, head_metric: HeadMetric, execution: Execution, *, keep: int, error: float, seed: int = 3407
) -> HeadScores:
    """Score heads, and drop those that have surely lost against the `keep` best.

    `error` is the probability of finding other heads than exact scoring does, `seed` draws the items' order.

    Raises:
        DataError: the metric is not a mean over examples.
    """
    require_mean(prepared, head_metric)
    alive = all_heads(prepared)
    items = len(prepared.pairs()) if head_metric == "logprob" else len(prepared)
    order, stages = np.random.default_rng(seed).permutation(items), rounds(items)
    shape, heads = heads_shape(prepared), sum(map(len, alive))
    base, replaced = np.empty(items), np.full((*shape, items), np.nan)
    level = error / (keep * heads * max(1, len(stages) - 1))
    evaluations = 0
    for number, (begin, end) in enumerate(pairwise([0, *stages])):
        drawn, seen = np.sort(order[begin:end]), np.sort(order[:end])
        drawn_base, drawn_replaced = statistics_of(
            prepared, head_metric, alive, execution, among=drawn.tolist(), step=f"race-{number}"
        )
        base[drawn] = drawn_base[:, 0]
        for of_layer, values in zip(alive, drawn_replaced, strict=True):
            for (layer, head), value in zip(of_layer, values, strict=True):
                replaced[layer, head, drawn] = value[:, 0]
        evaluations += len(drawn) * sum(map(len, alive))
        if end < items:
            running = [head for of_layer in alive for head in of_layer]
            drops = np.stack([base[seen] - replaced[head][seen] for head in running])
            stays = dict(zip(running, surviving(drops, items, keep, level), strict=True))
            alive = [[head for head in of_layer if stays[head]] for of_layer in alive]

    def mean(values: FloatArray) -> float:
        return utility(prepared, head_metric, values[:, None])

    scores = np.full(shape, np.nan, dtype=np.float32)
    for index in np.ndindex(shape):
        run_on = ~np.isnan(replaced[index])
        if not run_on.any():
            continue  # there is no such head
        scores[index] = mean(base[run_on]) - mean(replaced[index][run_on])
    finished = ~np.isnan(replaced).any(axis=-1)
    costs = Race(error, evaluations, heads * items, int(finished.sum()))
    return HeadScores(mean(base), scores, finished, costs)


def rounds(items: int) -> list[int]:
    """The number of items seen after each round; after the last one it is all."""
    sizes = {max(FIRST_ROUND, math.ceil(items / part)) for part in (8, 4, 2)}
    return [*sorted(size for size in sizes if size < items), items]


def surviving(drops: FloatArray, items: int, keep: int, level: float) -> npt.NDArray[np.bool_]:
    """Mark the heads that are not surely worse than `keep` others, bool [heads].

    `drops` [heads, seen] are on some of `items` items; `level` is the probability of error of one comparison.
    """
    heads, seen = drops.shape
    if heads <= keep:
        return np.ones(heads, dtype=bool)
    means, covariance = drops.mean(axis=1), np.cov(drops)
    variances = np.diag(covariance)
    of_difference = (variances[:, None] + variances - 2 * covariance).clip(min=0) / seen * (1 - seen / items)
    least = means[:, None] - means - student_quantile(level, seen - 1) * np.sqrt(of_difference)
    beaten_by: npt.NDArray[np.int_] = (least > 0).sum(axis=0)
    return beaten_by < keep


def student_quantile(level: float, freedom: int) -> float:
    """The value that a Student variable exceeds with probability `level` (Wallace's approximation of 1959)."""
    z = -NormalDist().inv_cdf(level) * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(z * z / freedom))


def require_mean(prepared: Prepared, head_metric: HeadMetric) -> None:
    """Check that heads are scored by a mean over items; raises DataError, naming the metric, if they are not."""
    if head_metric == "logprob":
        return
    task, example = prepared.task, prepared.examples[0]
    output = np.zeros(len(task.prompts(example))) if task.kind == "rank" else ""
    row = task.statistics(example, output)
    if len(row) != 1 or task.aggregate(np.ones(1), 4) != 0.25:
        raise DataError(
            f"{task.metric} is no mean over examples, so heads cannot be dropped after some of them; "
            "use --head-metric logprob or --heads exact"
        )
