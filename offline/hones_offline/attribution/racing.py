"""The heads that matter most from fewer evaluations: heads that have surely lost are not run on further examples.

Items (examples, or prompt-answer pairs where log-probabilities are scored) are drawn in random order without
replacement, in rounds. After each round a head is dropped if `keep` others beat it: their mean drop minus its own, on
the items seen, exceeds what chance explains. Heads that stay are run on all items, so that their scores are those of
the exact way, and the best are taken among them. So the heads can differ only if one of the best was dropped, and then
it was wrongly found to be worse than one that is not better.

The bound is Student's for the paired difference, with the correction for drawing from finitely many, at a level of
error / (keep · heads · rounds): the union bound over a best head, any other head and a round. It is approximate where a
mean is not normal. It fails for a head that matters in so few examples that a first round of an eighth holds none;
bounds that exclude that (Serfling's, with the range) drop hardly a head below thousands of examples.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from hones_offline.attribution.heads import HeadMetric, all_heads, statistics_of, utility
from hones_offline.data.metrics import FloatArray
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared
from hones_steer.errors import DataError

FIRST_ROUND = 32
"""Items at least, for a spread to be worth anything."""


@dataclass(frozen=True)
class Race:
    """What was saved, and at what risk."""

    error: float
    """Probability, at most and approximately, that the heads are not those of the exact way."""
    evaluations: int
    """Of one head on one item."""
    of: int
    """That the exact way takes."""
    finished: int
    """Heads that were run on all items."""


def race(
    prepared: Prepared, head_metric: HeadMetric, execution: Execution, *, keep: int, error: float, seed: int = 3407
) -> tuple[float, npt.NDArray[np.float32], npt.NDArray[np.bool_], Race]:
    """P(θ), scores [L, H], which heads were run on all items [L, H] (the others' scores are estimates), and the costs.

    Raises:
        DataError: the metric is not a mean over examples.
    """
    require_mean(prepared, head_metric)
    alive = all_heads(prepared)
    items = len(prepared.pairs()) if head_metric == "logprob" else len(prepared)
    order, stages = np.random.default_rng(seed).permutation(items), rounds(items)
    shape = len(alive), len(alive[0])
    base, replaced = np.empty(items), np.full((*shape, items), np.nan)
    level = error / (keep * math.prod(shape) * max(1, len(stages) - 1))
    evaluations = 0
    for number, (begin, end) in enumerate(pairwise([0, *stages])):
        drawn, seen = np.sort(order[begin:end]), np.sort(order[:end])
        found = statistics_of(prepared, head_metric, alive, execution, among=drawn.tolist(), step=f"race-{number}")
        base[drawn] = found[0][:, 0]
        for of_layer, values in zip(alive, found[1], strict=True):
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

    scores = np.empty(shape, dtype=np.float32)
    for index in np.ndindex(shape):
        run_on = ~np.isnan(replaced[index])
        scores[index] = mean(base[run_on]) - mean(replaced[index][run_on])
    finished = ~np.isnan(replaced).any(axis=-1)
    costs = Race(error, evaluations, math.prod(shape) * items, int(finished.sum()))
    return mean(base), scores, finished, costs


def rounds(items: int) -> list[int]:
    """How many items have been seen after each round; the last holds all."""
    sizes = {max(FIRST_ROUND, math.ceil(items / part)) for part in (8, 4, 2)}
    return [*sorted(size for size in sizes if size < items), items]


def surviving(drops: FloatArray, items: int, keep: int, level: float) -> npt.NDArray[np.bool_]:
    """Which heads are not surely worse than `keep` others, from their drops [heads, seen] on some of `items` items.

    `level` is the probability of error of one comparison.
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
    """What a Student variable exceeds with probability `level` (Wallace's approximation of 1959)."""
    z = -NormalDist().inv_cdf(level) * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(z * z / freedom))


def require_mean(prepared: Prepared, head_metric: HeadMetric) -> None:
    """Raise DataError, naming the metric, unless heads are scored by a mean over items."""
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
