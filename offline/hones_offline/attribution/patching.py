"""Attribution patching: the heads that matter most, preselected by one forward and one backward pass of every item.

1. Replacing head h turns its output x_h into x_h', the mean of its layer's other heads. To first order it costs the
   utility Σ_positions ⟨x_h − x_h', ∂P/∂x_h⟩, P being the mean log-probability of an answer's tokens. One backward pass
   gives that for all heads at once (Nanda 2023; AtP in Kramár et al., arXiv 2403.00745).
2. The heads with the highest estimates, as many as are wanted and a margin more, are run on all items. So their scores
   are those of exact scoring, and the best are chosen among them.

The heads differ from those of exact scoring where one of the best was estimated so low that the margin leaves it out.
docs/scaling.md has how often that is, and why neither of AtP*'s corrections is here.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from hones_offline.attribution.heads import HeadMetric, HeadScores, Preselection, all_heads, statistics_of, utility
from hones_offline.data.metrics import FloatArray
from hones_offline.running.batching import batches
from hones_offline.running.evaluation import mean_log_probabilities
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import head_outputs
from hones_offline.running.progress import progress_bar
from hones_offline.running.prompts import Prepared
from hones_steer.errors import DataError


def preselect(
    prepared: Prepared, head_metric: HeadMetric, execution: Execution, *, keep: int, margin: float
) -> HeadScores:
    """Score the heads whose estimates are among the best exactly: `keep` of them, and the share `margin` of it more.

    Heads are estimated by log-probability whatever the metric. The others keep their estimates where they are scored by
    it too, and else have no score (NaN).

    Raises:
        DataError: an estimate is not finite.
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
        DataError: an estimate is not finite.
    """
    lengths = [len(prompt) + len(answer) for prompt, answer in prepared.pairs()]
    pair_batches = list(batches(lengths, execution.batch_size))
    mine = [number for number in range(len(pair_batches)) if execution.processes.owns(number)]
    computed: dict[int, FloatArray] = {}
    with progress_bar(f"{prepared.task.name}: estimate", len(mine), show=execution.shows_progress) as bar:
        for number in mine:

            def compute(items: Sequence[int]) -> dict[str, FloatArray]:
                return {"estimates": estimates_of(prepared, items).sum(axis=0)}

            step = execution.arrays(f"estimates-{number:05d}", partial(compute, pair_batches[number]))
            computed[number] = step["estimates"]
            bar.update(1)
    shared = {number: sums for of_process in execution.processes.share(computed) for number, sums in of_process.items()}
    mean: FloatArray = np.sum([shared[number] for number in range(len(pair_batches))], axis=0) / len(lengths)
    if not np.isfinite(mean).all():
        raise DataError(
            f"task {prepared.task.name!r}: the gradients that heads are estimated by are not finite; "
            "use --dtype bfloat16 or float32, or --heads exact"
        )
    return mean


def estimates_of(prepared: Prepared, items: Sequence[int]) -> FloatArray:
    """What replacing each head costs each of some pairs' log-probabilities, to first order: float64 [pairs, L, H]."""
    decoder, pairs = prepared.decoder, prepared.pairs()
    prompts, answers = zip(*(pairs[i] for i in items), strict=True)
    batch = decoder.collate([decoder.answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])
    with torch.enable_grad(), head_outputs(decoder.layout) as recorded:
        # The weights may be frozen; the graph then begins at the embeddings.
        hidden, _ = decoder.run(replace(batch, embeds=batch.embeds.requires_grad_()))
        ends = torch.full((len(hidden),), hidden.shape[1])
        utilities = mean_log_probabilities(decoder, hidden, ends, answers)
        gradients = torch.autograd.grad(utilities.sum(), list(recorded.values()))
    real = batch.mask.bool()[..., None, None]
    of_layers: list[npt.NDArray[np.float64]] = []
    for x, gradient in zip(recorded.values(), gradients, strict=True):  # [pairs, T, heads, head_dim]
        outputs, count = x.detach().float(), x.shape[-2]
        losses = count / (count - 1) * (outputs - outputs.mean(-2, keepdim=True))  # x_h − x_h'
        products = (losses * gradient.float()).where(real.to(losses.device), 0)
        of_layers.append(products.sum((1, 3)).double().cpu().numpy())
    return np.stack(of_layers, axis=1)
