"""Head scores: how much a task loses when one attention head's output is replaced (paper section 3.1, design 2.1)."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from hones_offline.evaluate import mean_log_probability, score
from hones_offline.prompts import Prepared
from hones_offline.recording import replaced_head
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


def layer_head_scores(
    prepared: Prepared,
    layer: int,
    base: float,
    head_metric: HeadMetric,
    *,
    batch_size: int,
    tick: Callable[[], object] = lambda: None,
) -> list[float]:
    """S(h) = P(θ) − P(θ_Ih) for the heads of one layer; `tick` is called after each."""
    layout = prepared.decoder.layout
    scores = []
    for head in range(head_count(layout.layers[layer])):
        with replaced_head(layout, layer, head):
            scores.append(base - utility(prepared, head_metric, batch_size=batch_size))
        tick()
    return scores


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
