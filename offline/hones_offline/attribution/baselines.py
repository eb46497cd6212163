"""The methods that attribution is compared with: importance of neurons found without heads (docs/methods.md).

DVP, MA and gradient × activation look where the write-in looks: at z, the input of the down-projection, at a prompt's
last token. The write-in is taken of each example's first prompt, the others of each (prompt, answer) pair that is
learned. Activation probability and its entropy over tasks are LAPE's (Tang et al., ACL 2024): over all tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hones_offline.attribution.write_in import mean_write_in
from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Importance, NeuronIndex
from hones_offline.running.backward import AnsweredBatch, factor_gradients, frozen, rows_at_once
from hones_offline.running.batching import batches
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared
from hones_offline.running.readings import active_tokens, recorded_ffn
from hones_steer.errors import DataError
from hones_steer.layout import ffn_gate


def activation_probability(prepared: Prepared, execution: Execution) -> Importance:
    """AP: the share of all tokens, of prompts and answers, at which a neuron is active, act(gate(x)) > 0 (LAPE).

    In an FFN without a gate it is z = act(up(x)) > 0. An expert's is active at tokens only that it is chosen for.

    Raises:
        LayoutError: the gate of the model's FFNs cannot be told.
    """
    decoder, pairs = prepared.decoder, prepared.pairs()
    index = NeuronIndex.of(decoder.layout)
    # After an answer's last token nothing is read, so that it does not run.
    lengths = [len(prompt) + len(answer) - 1 for prompt, answer in pairs]

    def of_batch(numbers: Sequence[int]) -> FloatArray:
        total = np.zeros(index.size)
        batch = AnsweredBatch(decoder, [pairs[i] for i in numbers]).batch
        with torch.no_grad(), active_tokens(decoder.layout, batch.mask.bool()) as counted:
            decoder.run(batch)
        for ffn, count in counted.items():
            total[index[ffn]] = count.cpu().numpy()
        return total

    return _mean(index, execution, of_batch, lengths, sum(lengths))


def require_gates(prepared: Prepared, _execution: Execution) -> None:
    """Raise LayoutError, naming the layer, unless it is known in every FFN which neurons are active."""
    for layer in prepared.decoder.layout.layers:
        for projection in layer.projections:
            ffn_gate(layer, projection.down_proj)
        if layer.experts is not None:
            _ = layer.experts.active


def mean_activation(prepared: Prepared, execution: Execution) -> Importance:
    """MA: the mean of |z| over (prompt, answer) pairs, at the prompt's last token; 0 of experts not chosen there."""
    decoder, index = prepared.decoder, NeuronIndex.of(prepared.decoder.layout)
    prompts = [prompt for prompt, _ in prepared.pairs()]

    def of_batch(numbers: Sequence[int]) -> FloatArray:
        total = np.zeros(index.size)
        batch = decoder.prefix_batch([prompts[i] for i in numbers], [1] * len(numbers))
        with torch.no_grad(), recorded_ffn(decoder.layout, batch.ends - 1) as recorded:
            batch.run(decoder.run)
        for ffn, z in recorded.items():
            total[index[ffn]] = z.abs().sum(0, dtype=torch.float64).cpu().numpy()
        return total

    return _mean(index, execution, of_batch, list(map(len, prompts)), len(prompts))


def _mean(
    index: NeuronIndex,
    execution: Execution,
    of_batch: Callable[[Sequence[int]], FloatArray],
    lengths: Sequence[int],
    count: int,
    rows: int | None = None,
) -> Importance:
    """The sum [N] of `of_batch` over batches of texts of these lengths, over `count`; processes share the batches."""
    units = [partial(of_batch, numbers) for numbers in batches(lengths, rows or execution.batch_size)]
    return Importance(index, (execution.processes.sum(units, (index.size,)) / count).astype(np.float32))


def direct_write_in(prepared: Prepared, directions: Tensor, execution: Execution) -> Importance:
    """DVP, the direct write-in or logit lens: the mean of c_{l,i} over examples; `directions` [examples, hidden]."""
    (mean,) = mean_write_in(prepared, directions, execution)
    return Importance(NeuronIndex.of(prepared.decoder.layout), mean.astype(np.float32))


def gradient_activation(prepared: Prepared, execution: Execution) -> Importance:
    """Gradient × activation: the mean of z·∂P/∂z over pairs, P the answer's mean token log-probability.

    It is signed, as in attribution patching: to first order what P loses when z is set to 0 there.

    Raises:
        LayoutError: the model cannot be run backward.
        DataError: the longest pair needs more memory than the execution has.
    """
    decoder, pairs = prepared.decoder, prepared.pairs()
    index = NeuronIndex.of(decoder.layout)
    rows = rows_at_once(prepared, execution)

    def of_batch(numbers: Sequence[int]) -> FloatArray:
        total = np.zeros(index.size)
        gradients = factor_gradients(decoder, [pairs[i] for i in numbers], last_prompt_token=True)
        for ffn, of_ffn in gradients.items():
            total[index[ffn]] = of_ffn.sum(0, dtype=torch.float64).cpu().numpy()
        return total

    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    with frozen(decoder.model):
        return _mean(index, execution, of_batch, lengths, len(pairs), rows)


def random_importance(prepared: Prepared, seed: int) -> Importance:
    """Random numbers, evenly drawn from [0, 1)."""
    index = NeuronIndex.of(prepared.decoder.layout)
    return Importance(index, np.random.default_rng(seed).random(index.size, dtype=np.float32))


_ACTIVE = 0.95  # LAPE's: a neuron is a task's own if its probability there is in the top 5% of all


def activation_entropy(probabilities: Mapping[str, Importance]) -> dict[str, Importance]:
    """APE: neurons that are active in few of the tasks, from each task's activation probability (LAPE, ACL 2024).

    A neuron's probabilities over the tasks are normalized to sum 1; importance is ln(tasks) less their entropy, the
    same for every task. As in LAPE a neuron is a task's own only if its probability there is in the top 5% of all
    neurons' in all tasks. LAPE's banks have whatever size that gives; here those neurons come first (by ln(tasks)
    more) and the others after them, so that banks have the size asked for.

    Raises:
        DataError: there are fewer than two tasks to compare.
    """
    if len(probabilities) < 2:
        raise DataError("method 'ape' compares tasks; give at least two")
    stacked = np.stack([importance.values for importance in probabilities.values()]).astype(np.float64)  # [tasks, N]
    total = stacked.sum(0)
    shares = stacked / np.where(total > 0, total, 1)
    logarithms = np.log(np.where(shares > 0, shares, 1))
    top = np.log(len(stacked))
    specific = np.where(total > 0, top + (shares * logarithms).sum(0), 0).clip(min=0)
    active = stacked >= np.quantile(stacked, _ACTIVE)
    return {
        task: Importance(importance.index, (specific + top * own).astype(np.float32))
        for (task, importance), own in zip(probabilities.items(), active, strict=True)
    }
