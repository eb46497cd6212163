"""Write-in and head-guided importance of FFN neurons (paper sections 3.2-3.3, design 2.2-2.3)."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hones_offline.attribution.ablation import HeadRuns, Parts
from hones_offline.data.metrics import FloatArray
from hones_offline.running.decoder import Run, Segment, batches
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import Entering, Head, recorded_ffn
from hones_offline.running.prompts import Prepared
from hones_steer.errors import DataError
from hones_steer.layout import down_weight

MAX_TARGET_TOKENS = 128
WRITE_IN = "of the first prompt towards target_texts"
"""The definition of write-in; runs that were begun with another one are not resumed."""

Target = Literal["paper", "contrastive", "centred"]
PositivePart = Literal["mean", "example"]
HeadWeights = Literal["score", "rank"]


def target_directions(prepared: Prepared, target: Target = "paper") -> Tensor:
    """u_y of every example's first prompt: unit vectors, float32 [examples, hidden].

    The sum of the unembedding rows of the tokens of the task's `target_texts`, joined, special tokens dropped, the
    first 128; for a task with `idf_weighted` each row is weighted by the token's smoothed IDF over these examples.

    "centred": of the rows less their mean over the vocabulary, which every token has in common. "contrastive": the
    paper's u_y less the mean of the other examples', normalised again: what tells this answer from the task's others.

    Raises:
        DataError: a target has no token, or "contrastive" of targets that are all the same.
    """
    tokens = [_target_tokens(prepared, " ".join(prepared.task.target_texts(example))) for example in prepared.examples]
    weights = _smoothed_idf(tokens) if prepared.task.idf_weighted else {}
    unembedding = prepared.decoder.unembedding.weight
    assert isinstance(unembedding, Tensor)
    common = unembedding.detach().float().mean(0).cpu() if target == "centred" else 0.0
    sums = [
        torch.tensor([weights.get(t, 1.0) for t in row]) @ (unembedding.detach()[row].float().cpu() - common)
        for row in tokens
    ]
    units = F.normalize(torch.stack(sums), dim=-1)
    return _apart(prepared, units) if target == "contrastive" else units


_SAME = 1e-4  # a length that rounding gives the difference of equal unit vectors, at most


def _apart(prepared: Prepared, units: Tensor) -> Tensor:
    """Each unit vector less the mean of the others, normalised; that is the direction of u less the mean of all."""
    differences = units - units.mean(0)
    if differences.norm(dim=-1).max() < _SAME:
        raise DataError(
            f"task {prepared.task.name!r}: its {len(units)} targets are all the same, so that nothing tells one from "
            "the others; use target 'paper' or 'centred'"
        )
    return F.normalize(differences, dim=-1, eps=_SAME)


def _target_tokens(prepared: Prepared, text: str) -> list[int]:
    special = set(prepared.tokenizer.all_special_ids)
    ids: list[int] = prepared.tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = [token for token in ids if token not in special][:MAX_TARGET_TOKENS]
    if not kept:
        raise DataError(f"the target {text!r} has no token that is not special")
    return kept


def _smoothed_idf(documents: Sequence[Sequence[int]]) -> dict[int, float]:
    """ln((n+1)/(df+1)) + 1 per token."""
    frequency = Counter(token for document in documents for token in set(document))
    return {token: math.log((len(documents) + 1) / (df + 1)) + 1 for token, df in frequency.items()}


def importance(
    prepared: Prepared,
    directions: Tensor,
    heads: Sequence[tuple[int, int, float]],
    execution: Execution,
    *,
    positive_part: PositivePart = "mean",
) -> npt.NDArray[np.float32]:
    """I_{l,i} = Σ_h w_h·[mean c(θ) − mean c(θ_Ih)]_+ / Σ_h w_h, float32 [L, I]; `heads` are (layer, head, w).

    With the positive part of each "example": Σ_h w_h·mean [c(θ) − c(θ_Ih)]_+ / Σ_h w_h, so that a neuron that serves
    some answers is not cancelled by what it does to the others.
    """
    replaced = [(layer, head) for layer, head, _ in heads]
    kind = WriteInDrops if positive_part == "example" else WriteIn
    base, *changed = _means(kind, prepared, directions, replaced, execution)
    drops = changed if positive_part == "example" else [(base - mean).clip(min=0) for mean in changed]
    weights = [weight for _, _, weight in heads]
    weighed = [weight * drop for weight, drop in zip(weights, drops, strict=True)]
    result: npt.NDArray[np.float32] = (sum(weighed) / sum(weights)).astype(np.float32)
    return result


def weigh(heads: Sequence[tuple[int, int, float]], weights: HeadWeights) -> list[tuple[int, int, float]]:
    """Heads, strongest first, weighted by their scores as they come, or by "rank": (K − r) / K for r = 0 … K − 1."""
    if weights == "score":
        return list(heads)
    return [(layer, head, 1 - rank / len(heads)) for rank, (layer, head, _) in enumerate(heads)]


def mean_write_in(
    prepared: Prepared,
    directions: Tensor,
    execution: Execution,
    heads: Sequence[Head] = (),
) -> FloatArray:
    """Mean over examples of c_{l,i} = z_i·⟨W_down[:,i], u_y⟩ at the first prompt's last token.

    That is float64 [1 + heads, L, I], first with every head in place, then with each of `heads` replaced. Each
    process of `execution` runs some of the batches.
    """
    return _means(WriteIn, prepared, directions, heads, execution)


def _means(
    kind: "type[WriteIn]",
    prepared: Prepared,
    directions: Tensor,
    heads: Sequence[Head],
    execution: Execution,
) -> FloatArray:
    """The mean over examples of what `kind` sums, [1 + heads, L, I]."""
    layout = prepared.decoder.layout
    prompts = [encoded.prompt(0) for encoded in prepared.encoded]

    def of_batch(chosen: list[int]) -> FloatArray:
        some = [prompts[i] for i in chosen]
        runs = kind(prepared, some, directions[chosen], execution)
        return np.stack([runs.base(), *runs.results(heads)])

    units = [partial(of_batch, chosen) for chosen in batches([len(prompt) for prompt in prompts], execution.batch_size)]
    shape = (1 + len(heads), len(layout.layers), layout.intermediate_size)
    return execution.processes.sum(units, shape) / len(prompts)


class WriteIn(HeadRuns):
    """Items are prompts with their target directions [items, hidden]; the result is Σ c_{l,i}, float64 [L, I]."""

    def __init__(
        self, prepared: Prepared, prompts: Sequence[Segment], directions: Tensor, execution: Execution
    ) -> None:
        self.layout = prepared.decoder.layout
        self.parts = Parts(prepared.decoder, prompts, [1] * len(prompts), execution)
        weights = [down_weight(layer) for layer in self.layout.layers]
        self.alignments = [directions.to(weight.device) @ weight.float() for weight in weights]  # [items, I]
        super().__init__(prepared, execution, copies=self.parts.copies, tokens=self.parts.tokens)

    def undisturbed(self) -> FloatArray:
        nothing = np.zeros((1, len(self.alignments), self.layout.intermediate_size))
        sums: FloatArray = self._sums(self.decoder.run, nothing)[0]
        return sums

    def replaced(self, heads: Sequence[Head], states: Sequence[Entering]) -> Sequence[FloatArray]:
        unchanged = self._base[None].repeat(len(heads), axis=0)
        return list(self._sums(self.resuming(heads, states), unchanged, first=states[0].layer))

    def _sums(self, run: Run, unchanged: FloatArray, *, first: int = 0) -> FloatArray:
        """Σ over the items for each copy of the rows, [copies, L, I]; layers below `first` do not run and stay so."""
        sums: dict[int, Tensor] = {}
        for layer, items, written in self._written(run, len(unchanged), first=first):
            of_part = self._counted(layer, items, written).sum(1, dtype=torch.float64)
            sums[layer] = sums[layer] + of_part if layer in sums else of_part
        for layer, total in sums.items():
            unchanged[:, layer] = total.cpu().numpy()
        return unchanged

    def _written(self, run: Run, copies: int, *, first: int = 0) -> Iterator[tuple[int, list[int], Tensor]]:
        """Layers from `first` on, some items and their c: [copies, items, I]."""
        begun = self.parts.begin(run)
        for items, rows in self.parts:
            with recorded_ffn(self.layout, (rows.ends - 1).repeat(copies), first=first) as recorded:
                rows.go_on(run, begun)
            for layer, z in recorded.items():  # [copies·items, I]
                yield layer, items, z.unflatten(0, (copies, -1)) * self.alignments[layer][items]

    def _counted(self, _layer: int, _items: list[int], written: Tensor) -> Tensor:
        """What is summed."""
        return written


class WriteInDrops(WriteIn):
    """The result with a head replaced is Σ [c(θ) − c(θ_Ih)]_+ over the items, float64 [L, I]; undisturbed it is 0."""

    def undisturbed(self) -> FloatArray:
        self._whole = [torch.zeros_like(alignments) for alignments in self.alignments]
        for layer, items, written in self._written(self.decoder.run, 1):
            self._whole[layer][items] = written[0]
        return np.zeros((len(self.alignments), self.layout.intermediate_size))

    def _counted(self, layer: int, items: list[int], written: Tensor) -> Tensor:
        return (self._whole[layer][items] - written).clamp(min=0)
