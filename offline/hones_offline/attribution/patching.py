"""Heads by preselection: those that matter most, found by a few backward passes before any head is replaced.

1. Replacing head h moves its output x_h to x_h', the mean of its layer's other heads. To first order that costs the
   utility Σ_positions ⟨x_h − x_h', ∂P/∂x_h⟩, P being the mean log-probability of an answer's tokens. One backward pass
   gives it for all heads at once: attribution patching (Nanda 2023; AtP in Kramár et al., arXiv 2403.00745).
2. Where it misleads, two other estimates help. Its absolute value, item by item, finds heads that cost some items much
   and seem to help others as much. The slope with every head half-way to x_h' finds what matters to a model that is so
   sure of its answers that it has hardly a slope where it is (after EAP-IG, Hanna et al., arXiv 2403.17806).
3. The heads that are high in one of the three rankings, as many as are wanted and a margin more, are run on all items.
   So their scores are those of exact scoring, and the best are chosen among them.

The heads differ from those of exact scoring where one of the best is low in all three. docs/scaling.md has how often
that is, and what else was tried.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from hones_offline.attribution.heads import HeadMetric, HeadScores, Preselection, all_heads, statistics_of, utility
from hones_offline.data.metrics import FloatArray
from hones_offline.running.backward import AnsweredBatch, frozen, gradients_by, rows_at_once
from hones_offline.running.batching import batches
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.execution import Execution
from hones_offline.running.interventions import moved_heads
from hones_offline.running.progress import progress_bar
from hones_offline.running.prompts import Pair, Prepared
from hones_steer.errors import DataError


def preselect(
    prepared: Prepared, head_metric: HeadMetric, execution: Execution, *, keep: int, margin: float
) -> HeadScores:
    """Score the heads whose estimates are among the best exactly: `keep` of them, and the share `margin` of it more.

    Heads are estimated by log-probability whatever the metric. The others keep the first-order estimate where they are
    scored by log-probability too, and else have no score (NaN).

    Raises:
        DataError: an estimate is not finite, or the longest pair needs more memory than the execution has.
        LayoutError: the model cannot be run backward.
    """
    estimates = head_estimates(prepared, execution)
    finished = highest(estimates, math.ceil(keep * (1 + margin)))
    heads = [[head for head in of_layer if finished[head]] for of_layer in all_heads(prepared)]
    base, replaced = statistics_of(prepared, head_metric, heads, execution, step="confirm")
    whole = utility(prepared, head_metric, base)
    scores = np.full(finished.shape, np.nan, dtype=np.float32)
    if head_metric == "logprob":
        scores[:] = estimates[0]
    for of_layer, values in zip(heads, replaced, strict=True):
        for head, value in zip(of_layer, values, strict=True):
            scores[head] = whole - utility(prepared, head_metric, value)
    run, items, every = int(finished.sum()), len(base), sum(map(len, all_heads(prepared)))
    costs = Preselection(margin, len(prepared.pairs()), run * items, every * items, run)
    return HeadScores(whole, scores, finished, preselection=costs)


def highest(estimates: FloatArray, count: int) -> npt.NDArray[np.bool_]:
    """Mark `count` heads, bool [L, H]: the first by each of the `estimates` [3, L, H], then the second, and so on.

    Where estimates are NaN there is no head.
    """
    rankings, count = len(estimates), min(count, int((~np.isnan(estimates[0])).sum()))
    ranks = np.argsort(np.argsort(-estimates.reshape(rankings, -1), axis=1, kind="stable"), axis=1)
    marked = np.zeros(estimates.shape[1:], dtype=np.bool_)
    marked.flat[np.argsort(ranks.min(axis=0) * rankings + ranks.argmin(axis=0))[:count]] = True
    return marked


def head_estimates(prepared: Prepared, execution: Execution) -> FloatArray:
    """Three estimates of S(h) by log-probability, float64 [3, L, H], NaN where a layer has fewer than H heads.

    They are means over pairs: of the first-order cost, of its absolute value, and of the slope half-way. A batch of
    pairs is a step of one process.

    Raises:
        DataError: an estimate is not finite, or the longest pair needs more memory than the execution has.
        LayoutError: the model cannot be run backward.
    """
    pairs, processes = prepared.pairs(), execution.processes
    rows = rows_at_once(prepared, execution, partial(moved_heads, share=0.5))
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    mine = [(n, items) for n, items in enumerate(batches(lengths, rows)) if processes.owns(n)]

    def compute(items: Sequence[int]) -> dict[str, FloatArray]:
        some = [pairs[i] for i in items]
        first, half_way = (slopes(prepared.decoder, some, share) for share in (0.0, 0.5))
        return {"estimates": np.stack([first, np.abs(first), half_way]).sum(axis=1)}

    computed: dict[int, FloatArray] = {}
    with progress_bar(f"{prepared.task.name}: estimates", len(mine), show=execution.shows_progress) as bar:
        for number, items in mine:
            computed[number] = execution.arrays(f"estimates-{number:05d}", partial(compute, items))["estimates"]
            bar.update(1)
    shared = {number: sums for of_process in processes.share(computed) for number, sums in of_process.items()}
    means: FloatArray = np.sum([shared[number] for number in sorted(shared)], axis=0) / len(pairs)
    if not np.isfinite(means).all(axis=0).sum() == sum(map(len, all_heads(prepared))):
        raise DataError(
            f"task {prepared.task.name!r}: the gradients that heads are estimated by are not finite; "
            "use --dtype bfloat16 or float32, or --heads exact"
        )
    return means


def slopes(decoder: TextDecoder, pairs: Sequence[Pair], share: float) -> FloatArray:
    """Cost of moving each head to its replacement, with all a `share` of the way there: float64 [pairs, L, H].

    NaN where a layer has fewer than H heads.
    """
    with frozen(decoder.model):
        gradients = gradients_by(partial(moved_heads, share=share), AnsweredBatch(decoder, pairs))
    heads = max(of_layer.shape[1] for of_layer in gradients.values())
    found = np.full((len(pairs), len(decoder.layout.layers), heads), np.nan)
    for layer, of_layer in gradients.items():
        found[:, layer, : of_layer.shape[1]] = -of_layer.double().cpu().numpy()
    return found
