"""Write-in and head-guided importance of FFN neurons (HONES, arXiv 2604.17941, sections 3.2 and 3.3).

docs/methods.md has the definitions, also of the variants. For each batch of prompts the write-in is summed with every
head in place and with each head replaced (`ablation.py`); the sums of all batches give the means.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hones_offline.attribution.ablation import HeadAblation, Resumption
from hones_offline.attribution.heads import WeightedHead
from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Importance, NeuronIndex
from hones_offline.running.batching import Run, Segment, batches
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import Head
from hones_offline.running.length_buckets import LengthBuckets
from hones_offline.running.prompts import Prepared
from hones_offline.running.readings import SIGMOID_GATE, recorded_ffn
from hones_steer.errors import DataError, LayoutError
from hones_steer.ffns import EXPERTS, Ffn
from hones_steer.layout import Layout, down_weight

MAX_TARGET_TOKENS = 128
WRITE_IN = "of the first prompt towards target_texts"
"""The definition of write-in; runs that were begun with another one are not resumed."""

Target = Literal["paper", "contrastive", "centred"]
PositivePart = Literal["mean", "example"]


def target_directions(prepared: Prepared, target: Target = "paper") -> Tensor:
    """Target directions u_y of every example's first prompt: unit vectors, float32 [examples, hidden].

    u_y is the sum of the unembedding rows of the tokens of the task's `target_texts`, joined, special tokens dropped,
    the first 128; for a task with `idf_weighted` each row is weighted by the token's smoothed IDF over these examples.

    With "centred", the rows are taken less their mean over the vocabulary, which every token has in common. With
    "contrastive", u_y is the paper's less the mean of the other examples', normalized again: the direction that tells
    this answer from the task's others.

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


_SAME = 1e-4  # the length that rounding gives the difference of equal unit vectors, at most


def _apart(prepared: Prepared, units: Tensor) -> Tensor:
    """Each unit vector less the mean of the others, normalized; this is the direction of u less the mean of all.

    Raises DataError, naming the task, if all are the same.
    """
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


def head_guided_importance(
    prepared: Prepared,
    directions: Tensor,
    heads: Sequence[WeightedHead],
    execution: Execution,
    *,
    positive_part: PositivePart = "mean",
) -> Importance:
    """The importance of every neuron, I_{l,i} = Σ_h w_h·[mean c(θ) − mean c(θ_Ih)]_+ / Σ_h w_h.

    `heads` are (layer, head, w). With the positive part of each "example" it is Σ_h w_h·mean [c(θ) − c(θ_Ih)]_+ / Σ_h
    w_h, so that a neuron that serves some answers is not cancelled by what it does to the others.
    """
    replaced = [(layer, head) for layer, head, _ in heads]
    drops: list[FloatArray]
    if positive_part == "example":
        drops = list(_mean_over_examples(prepared, directions, execution, partial(_drops, heads=replaced), len(heads)))
    else:
        base, *changed = mean_write_in(prepared, directions, execution, replaced)
        drops = [(base - mean).clip(min=0) for mean in changed]
    weights = [weight for _, _, weight in heads]
    weighed = [weight * drop for weight, drop in zip(weights, drops, strict=True)]
    values = np.asarray(sum(weighed) / sum(weights), dtype=np.float32)
    return Importance(NeuronIndex.of(prepared.decoder.layout), values)


def mean_write_in(
    prepared: Prepared, directions: Tensor, execution: Execution, heads: Sequence[Head] = ()
) -> FloatArray:
    """Mean over examples of c_{l,i} = z_i·⟨W_down[:,i], u_y⟩ at the first prompt's last token.

    Of an expert it is times the weight that the router gives it there, and 0 where it is not chosen; of a shared expert
    with a gate of its own it is times what that gives there.

    The result is float64 [1 + heads, N], N being all neurons: first with every head in place, then with each of `heads`
    replaced. Each process of the execution runs some of the batches.
    """
    return _mean_over_examples(prepared, directions, execution, partial(_sums, heads=heads), 1 + len(heads))


def _mean_over_examples(
    prepared: Prepared,
    directions: Tensor,
    execution: Execution,
    batch_sums: Callable[["WriteInForwards", Execution], FloatArray],
    count: int,
) -> FloatArray:
    """The mean over examples of `batch_sums`, which are sums over a batch's examples, float64 [count, N]."""
    decoder = prepared.decoder
    prompts = [encoded.prompt(0) for encoded in prepared.encoded]

    def of_batch(items: list[int]) -> FloatArray:
        forwards = WriteInForwards(decoder, [prompts[i] for i in items], directions[items], execution)
        return batch_sums(forwards, execution)

    units = [partial(of_batch, items) for items in batches([len(prompt) for prompt in prompts], execution.batch_size)]
    shape = (count, NeuronIndex.of(decoder.layout).size)
    return execution.processes.sum(units, shape) / len(prompts)


def _sums(forwards: "WriteInForwards", execution: Execution, heads: Sequence[Head]) -> FloatArray:
    """Σ c over the prompts, with every head in place and with each of `heads` replaced, [1 + heads, N]."""
    ablation = HeadAblation(forwards.decoder, WriteInSums(forwards), execution)
    return np.stack([ablation.undisturbed(), *ablation.ablated(heads)])


def _drops(forwards: "WriteInForwards", execution: Execution, heads: Sequence[Head]) -> FloatArray:
    """Σ [c(θ) − c(θ_Ih)]_+ over the prompts for each of `heads`, [heads, N]."""
    return np.stack(HeadAblation(forwards.decoder, WriteInDrops(forwards), execution).ablated(heads))


class WriteInForwards:
    """Forwards of some prompts that give the write-in c_{l,i} towards each prompt's target direction."""

    def __init__(
        self, decoder: TextDecoder, prompts: Sequence[Segment], directions: Tensor, execution: Execution
    ) -> None:
        """Prepare the prompts; `directions` are their u_y, [prompts, hidden]."""
        self.decoder, self.layout = decoder, decoder.layout
        self.index = NeuronIndex.of(decoder.layout)
        self.buckets = LengthBuckets(decoder, prompts, [1] * len(prompts), execution)
        self.alignments = alignments(self.layout, directions)
        """⟨W_down[:,i], u_y⟩ of each FFN, or of all experts of a layer, [prompts, N]."""

    def run(self, run: Run, copies: int = 1, first: int = 0) -> Iterator[tuple[Ffn, list[int], Tensor]]:
        """Run the prompts: (FFN, prompts' numbers, c [copies, n, N]) for each bucket and FFN from layer `first` on."""
        prefix_cache = self.buckets.run_prefix(run)
        for items, batch in self.buckets:
            with recorded_ffn(self.layout, (batch.ends - 1).repeat(copies), first=first, weighted=True) as recorded:
                batch.run_rest(run, prefix_cache)
            for ffn, z in recorded.items():  # [copies·n, N of the FFN]
                yield ffn, items, z.unflatten(0, (copies, -1)) * self.alignments[ffn][items]

    def add_up(self, sums: FloatArray, terms: Iterable[tuple[Ffn, Tensor]]) -> FloatArray:
        """Fill in `sums` [copies, N], of each FFN that has terms [copies, n, ...], their sum over all n."""
        totals: dict[Ffn, Tensor] = {}
        for ffn, values in terms:
            total = values.sum(1, dtype=torch.float64)
            totals[ffn] = totals[ffn] + total if ffn in totals else total
        for ffn, total in totals.items():
            sums[:, self.index[ffn]] = total.cpu().numpy()
        return sums


def alignments(layout: Layout, directions: Tensor) -> dict[Ffn, Tensor]:
    """⟨W_down[:,i], u⟩ for directions u [prompts, hidden], of each FFN, or of all experts of a layer: [prompts, N]."""
    aligned: dict[Ffn, Tensor] = {}
    for projection in layout.projections:
        weight = down_weight(projection)
        aligned[projection.ffn] = directions.to(weight.device) @ weight.float()
    for layer, experts in layout.experts.items():
        weights = experts.down_weight()
        units = directions.to(weights.device)
        aligned[Ffn(layer, EXPERTS)] = torch.cat([units @ weight.float() for weight in weights.detach()], dim=1)
    return aligned


def require_write_in(prepared: Prepared, _execution: Execution) -> None:
    """Raise LayoutError, naming the layer, if a number that is not known weighs what an FFN adds."""
    for layer in prepared.decoder.layout.layers:
        gate = layer.shared_gate
        if gate is not None and not gate[0].endswith(SIGMOID_GATE):
            raise LayoutError(
                f"{layer.name}: its shared expert has a gate of its own, {gate[0]}, of which it is not known what it "
                "weighs by; use a method without write-in: fisher, grad_all, grad_abs, grad_act, head_grad or ma"
            )


class WriteInSums:
    """Measures Σ c_{l,i} over the prompts, float64 [N]."""

    def __init__(self, forwards: WriteInForwards) -> None:
        self.forwards = forwards
        self.copies, self.token_count = forwards.buckets.copies, forwards.buckets.token_count

    def undisturbed(self, run: Run) -> FloatArray:
        """Run the prompts with every head in place: the sums."""
        terms = ((ffn, c) for ffn, _, c in self.forwards.run(run))
        sums: FloatArray = self.forwards.add_up(np.zeros((1, self.forwards.index.size)), terms)[0]
        return sums

    def ablated(self, resumption: Resumption, base: FloatArray) -> list[FloatArray]:
        """Run them with heads replaced: the sums for each head, those of `base` in layers below the head's."""
        copies = len(resumption.heads)
        contributions = self.forwards.run(resumption.run, copies, resumption.layer)
        terms = ((ffn, c) for ffn, _, c in contributions)
        return list(self.forwards.add_up(base[None].repeat(copies, axis=0), terms))


class WriteInDrops:
    """Measures Σ [c(θ) − c(θ_Ih)]_+ over the prompts, float64 [N]; undisturbed, each FFN's c(θ) [prompts, N]."""

    def __init__(self, forwards: WriteInForwards) -> None:
        self.forwards = forwards
        self.copies, self.token_count = forwards.buckets.copies, forwards.buckets.token_count

    def undisturbed(self, run: Run) -> dict[Ffn, Tensor]:
        """Run the prompts with every head in place: c(θ) of every FFN."""
        base = {ffn: torch.zeros_like(aligned) for ffn, aligned in self.forwards.alignments.items()}
        for ffn, items, c in self.forwards.run(run):
            base[ffn][items] = c[0]
        return base

    def ablated(self, resumption: Resumption, base: Mapping[Ffn, Tensor]) -> list[FloatArray]:
        """Run them with heads replaced: the drops' sums for each head, 0 in layers below the head's."""
        copies = len(resumption.heads)
        drops = (
            (ffn, (base[ffn][items] - c).clamp(min=0))
            for ffn, items, c in self.forwards.run(resumption.run, copies, resumption.layer)
        )
        return list(self.forwards.add_up(np.zeros((copies, self.forwards.index.size)), drops))
