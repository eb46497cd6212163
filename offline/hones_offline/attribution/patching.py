"""Heads by preselection: those that matter most, found by one forward and one backward pass of every item.

1. Replacing head h moves its output x_h to x_h', the mean of its layer's other heads. With every head a share of the
   way there, what moving h further costs the utility is Σ_positions ⟨x_h − x_h', ∂P/∂x_h⟩, P being the mean
   log-probability of an answer's tokens. One backward pass gives that for all heads at once. With a share of 0 this is
   attribution patching (Nanda 2023; AtP in Kramár et al., arXiv 2403.00745).
2. The heads with the highest estimates, as many as are wanted and a margin more, are run on all items. So their scores
   are those of exact scoring, and the best are chosen among them.

The heads differ from those of exact scoring where one of the best was estimated so low that the margin leaves it out.
docs/scaling.md has how often that is, and what else was tried.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from hones_offline.attribution.heads import HeadMetric, HeadScores, Preselection, all_heads, statistics_of, utility
from hones_offline.data.metrics import FloatArray
from hones_offline.running.backward import AnsweredBatch, frozen, gradients_by, rows_at_once
from hones_offline.running.batching import batches
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import moved_heads
from hones_offline.running.progress import progress_bar
from hones_offline.running.prompts import Pair, Prepared
from hones_steer.errors import DataError

SHARE = 0.5
"""How far every head is moved where the slope is taken. At 0 a model that is sure of its answers has hardly a slope."""


def preselect(
    prepared: Prepared, head_metric: HeadMetric, execution: Execution, *, keep: int, margin: float
) -> HeadScores:
    """Score the heads whose estimates are among the best exactly: `keep` of them, and the share `margin` of it more.

    Heads are estimated by log-probability whatever the metric. The others keep their estimates where they are scored by
    it too, and else have no score (NaN).

    Raises:
        DataError: an estimate is not finite, or the longest pair needs more memory than the execution has.
        LayoutError: the model cannot be run backward.
    """
    estimates = estimated_scores(prepared, execution)
    shape, count = estimates.shape, math.ceil(keep * (1 + margin))
    finished = np.zeros(shape, dtype=np.bool_)
    finished.flat[np.argsort(-estimates.reshape(-1), kind="stable")[:count]] = True
    heads = [[head for head in of_layer if finished[head]] for of_layer in all_heads(prepared)]
    base, replaced = statistics_of(prepared, head_metric, heads, execution, step="confirm")
    whole = utility(prepared, head_metric, base)
    scores = estimates.astype(np.float32) if head_metric == "logprob" else np.full(shape, np.nan, dtype=np.float32)
    for of_layer, values in zip(heads, replaced, strict=True):
        for head, value in zip(of_layer, values, strict=True):
            scores[head] = whole - utility(prepared, head_metric, value)
    run, items = int(finished.sum()), len(base)
    costs = Preselection(margin, len(prepared.pairs()), run * items, math.prod(shape) * items, run)
    return HeadScores(whole, scores, finished, preselection=costs)


def estimated_scores(prepared: Prepared, execution: Execution) -> FloatArray:
    """Estimates of S(h) by log-probability, float64 [L, H]; a batch of pairs is a resumable step of one process.

    Raises:
        DataError: an estimate is not finite, or the longest pair needs more memory than the execution has.
        LayoutError: the model cannot be run backward.
    """
    pairs, processes = prepared.pairs(), execution.processes
    rows = rows_at_once(prepared, execution, partial(moved_heads, share=SHARE))
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    mine = [(n, items) for n, items in enumerate(batches(lengths, rows)) if processes.owns(n)]
    computed: dict[int, FloatArray] = {}
    with progress_bar(f"{prepared.task.name}: estimates", len(mine), show=execution.shows_progress) as bar:
        for number, items in mine:

            def compute(items: Sequence[int]) -> dict[str, FloatArray]:
                return {"estimates": estimates_of(prepared.decoder, [pairs[i] for i in items]).sum(axis=0)}

            computed[number] = execution.arrays(f"estimates-{number:05d}", partial(compute, items))["estimates"]
            bar.update(1)
    shared = {number: sums for of_process in processes.share(computed) for number, sums in of_process.items()}
    mean: FloatArray = np.sum([shared[number] for number in sorted(shared)], axis=0) / len(pairs)
    if not np.isfinite(mean).all():
        raise DataError(
            f"task {prepared.task.name!r}: the gradients that heads are estimated by are not finite; "
            "use --dtype bfloat16 or float32, or --heads exact"
        )
    return mean


def estimates_of(decoder: TextDecoder, pairs: Sequence[Pair]) -> FloatArray:
    """What replacing each head costs each pair's log-probability, estimated: float64 [pairs, L, H]."""
    with frozen(decoder.model):
        slopes = gradients_by(partial(moved_heads, share=SHARE), AnsweredBatch(decoder, pairs))
    return -np.stack([of_layer.double().cpu().numpy() for of_layer in slopes.values()], axis=1)
