"""Importance of neurons by the gradient of the utility, over all positions that masking and steering act on.

g_{x,i} = Σ z_i·∂P_x/∂z_i is the gradient of example x's utility by a factor on neuron i, at 1: what scaling the neuron
by 1 + ε changes, per ε. P_x is the mean over the example's (prompt, answer) pairs of the mean log-probability of the
answer's tokens. Its mean over examples and its mean square come from one pass, in resumable steps for all the methods
made from them. The head-mediated gradient is the part of it that heads account for: what replacing a head takes from
z·∂P/∂z. docs/methods.md has the definitions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hones_offline.attribution.ablation import HeadAblation, Resumption
from hones_offline.attribution.heads import WeightedHead
from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Importance, NeuronIndex
from hones_offline.running.activations import AnyActivations
from hones_offline.running.backward import (
    AnsweredBatch,
    factor_gradients,
    frozen,
    gradients_by,
    rows_at_once,
)
from hones_offline.running.batching import Run, batches, gib
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import Head
from hones_offline.running.progress import progress_bar
from hones_offline.running.prompts import Pair, Prepared
from hones_offline.running.readings import ffn_inputs, ffn_products
from hones_offline.running.run_folder import step_name
from hones_steer.ffns import Ffn

STEPS = 16  # that a run folder resumes from, each N numbers of a sum or more


def gradient(prepared: Prepared, execution: Execution) -> Importance:
    """The mean of g over examples: to first order what the utility loses when the neuron is set to 0."""
    return _importance(prepared, factor_moments(prepared, execution)[0])


def absolute_gradient(prepared: Prepared, execution: Execution) -> Importance:
    """The absolute value of the mean of g over examples."""
    return _importance(prepared, np.abs(factor_moments(prepared, execution)[0]))


def fisher(prepared: Prepared, execution: Execution) -> Importance:
    """The mean of g² over examples: the diagonal of the factors' empirical Fisher information."""
    return _importance(prepared, factor_moments(prepared, execution)[1])


def _importance(prepared: Prepared, values: FloatArray) -> Importance:
    return Importance(NeuronIndex.of(prepared.decoder.layout), values.astype(np.float32))


def factor_moments(prepared: Prepared, execution: Execution) -> FloatArray:
    """The means over examples of g and of g², float64 [2, N], in resumable steps that the processes share.

    Raises:
        LayoutError: the model cannot be run backward.
        DataError: the longest example needs more memory than the execution has.
    """
    pairs = prepared.pairs_by_example()
    rows = rows_at_once(prepared, execution)
    lengths = [max(len(prompt) + len(answer) for prompt, answer in own) for own in pairs]
    chosen = list(batches(lengths, max(1, rows // max(map(len, pairs)))))

    def of_batch(items: Sequence[int]) -> FloatArray:
        gradients = example_gradients(prepared, [pairs[i] for i in items], rows)
        return np.stack([gradients.sum(0), np.square(gradients).sum(0)])

    return _mean_over_examples(prepared, execution, of_batch, chosen, count=2, decisive="gradients")


def _mean_over_examples(
    prepared: Prepared,
    execution: Execution,
    of_batch: Callable[[Sequence[int]], FloatArray],
    chosen: Sequence[Sequence[int]],
    *,
    count: int,
    decisive: Any,
) -> FloatArray:
    """The sum [count, N] of `of_batch` over the batches `chosen`, over the examples.

    The batches are taken in at most `STEPS` resumable steps, whose batches the processes share; `decisive` (JSON) tells
    a step from those of other sums over the same examples.
    """
    processes, shape = execution.processes, (count, NeuronIndex.of(prepared.decoder.layout).size)
    name = step_name("gradients", [decisive, [example.id for example in prepared.examples], list(map(list, chosen))])
    size = -(-len(chosen) // STEPS)
    total = np.zeros(shape)
    with (
        frozen(prepared.decoder.model),
        progress_bar(f"{prepared.task.name}: gradients", len(chosen), show=execution.shows_progress) as bar,
    ):

        def sums(start: int, _: Execution) -> dict[str, FloatArray]:
            some = chosen[start : start + size]

            def counted(items: Sequence[int]) -> FloatArray:
                found = of_batch(items)
                bar.update(min(processes.size, start + len(some) - bar.n))
                return found

            return {"sums": processes.sum([partial(counted, items) for items in some], shape)}

        for start in range(0, len(chosen), size):
            total += execution.shared_step(f"{name}-{start}", partial(sums, start))["sums"]
            bar.update(min(start + size, len(chosen)) - bar.n)
    return total / len(prepared)


def example_gradients(prepared: Prepared, pairs: Sequence[Sequence[Pair]], rows: int) -> FloatArray:
    """Compute g of each example, the mean over its `pairs`: float64 [examples, N]; `rows` pairs run at a time."""
    index = NeuronIndex.of(prepared.decoder.layout)
    gradients = np.zeros((len(pairs), index.size))
    flat = [(example, pair) for example, own in enumerate(pairs) for pair in own]
    for start in range(0, len(flat), rows):
        examples, some = zip(*flat[start : start + rows], strict=True)
        for ffn, of_ffn in factor_gradients(prepared.decoder, some).items():
            np.add.at(gradients[:, index[ffn]], list(examples), of_ffn.double().cpu().numpy())
    gradients /= np.array([len(own) for own in pairs])[:, None]
    return gradients


def head_gradient(prepared: Prepared, heads: Sequence[WeightedHead], execution: Execution) -> Importance:
    """The head-mediated gradient, Σ_h w_h·[mean Σ (z − z_h)·∂P/∂z]_+ / Σ_h w_h, over all positions.

    `heads` are (layer, head, w); z_h is z with head h replaced, ∂P/∂z the undisturbed model's.

    Raises:
        LayoutError: the model cannot be run backward.
        DataError: the longest pair needs more memory than the execution has.
    """
    drops = mean_product_drops(prepared, [(layer, head) for layer, head, _ in heads], execution).clip(min=0)
    weights = np.array([weight for _, _, weight in heads])
    return _importance(prepared, weights @ drops / weights.sum())


def head_gradient_rows(prepared: Prepared, execution: Execution) -> int:
    """How many pairs `head_gradient` runs together; raises as it does."""
    return rows_at_once(prepared, execution, ffn_inputs)


def mean_product_drops(prepared: Prepared, heads: Sequence[Head], execution: Execution) -> FloatArray:
    """The mean over examples of Σ (z − z_h)·∂P/∂z for each of `heads`, float64 [heads, N].

    Each process of the execution runs some of the batches.
    """
    pairs = [(pair, 1 / len(own)) for own in prepared.pairs_by_example() for pair in own]
    lengths = [len(prompt) + len(answer) for (prompt, answer), _ in pairs]
    chosen = list(batches(lengths, head_gradient_rows(prepared, execution)))

    def of_batch(numbers: Sequence[int]) -> FloatArray:
        some, shares = zip(*(pairs[i] for i in numbers), strict=True)
        products = GradientProducts(AnsweredBatch(prepared.decoder, some), torch.tensor(shares), execution)
        # The states that heads are replaced from lie beside the gradients.
        beside = replace(execution, memory_gb=execution.memory_gb - products.nbytes / gib(1))
        ablation = HeadAblation(prepared.decoder, products, beside)
        return ablation.undisturbed() - np.stack(ablation.ablated(heads))

    return _mean_over_examples(prepared, execution, of_batch, chosen, count=len(heads), decisive=list(heads))


class GradientProducts:
    """Measures Σ share·z·∂P/∂z over some pairs and all positions, float64 [N]; ∂P/∂z stays the undisturbed model's."""

    def __init__(self, batch: AnsweredBatch, shares: Tensor, execution: Execution) -> None:
        """Run the pairs backward once; `shares` [pairs] weigh them."""
        self.batch, self.index = batch, NeuronIndex.of(batch.decoder.layout)
        self.shares, calls = shares.double(), dict[Ffn, AnyActivations]()
        gradients = gradients_by(partial(ffn_inputs, calls=calls), batch)
        self.gradients = {ffn: calls[ffn].of(of_ffn) for ffn, of_ffn in gradients.items()}
        rows, length = batch.batch.mask.shape
        self.copies, self.token_count = max(1, execution.batch_size // rows), rows * length

    @property
    def nbytes(self) -> int:
        """Bytes of the gradients that are kept; what `rows_at_once` has counted is more."""
        return sum(of_ffn.z.nbytes for of_ffn in self.gradients.values())

    def undisturbed(self, run: Run) -> FloatArray:
        """Run the pairs with every head in place: the sums."""
        sums: FloatArray = self._fill(np.zeros((1, self.index.size)), run, 0)[0]
        return sums

    def ablated(self, resumption: Resumption, base: FloatArray) -> list[FloatArray]:
        """Run them with heads replaced: the sums for each head, those of `base` in layers below the head's."""
        sums = base[None].repeat(len(resumption.heads), axis=0)
        return list(self._fill(sums, resumption.run, resumption.layer))

    def _fill(self, sums: FloatArray, run: Run, first: int) -> FloatArray:
        with ffn_products(self.batch.decoder.layout, self.gradients, first=first) as products:
            run(self.batch.batch, None)
        for ffn, of_ffn in products.items():
            sums[:, self.index[ffn]] = (self.shares[:, None] * of_ffn.cpu()).sum(1).numpy()
        return sums
