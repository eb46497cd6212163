"""The methods that attribution is compared with: importance of neurons found without heads (docs/methods.md).

Each looks where the write-in looks: at z, the input of the down-projection, at a prompt's last token. The write-in is
taken of each example's first prompt, the others of each (prompt, answer) pair that is learned. z is what masking and
steering act on and what every architecture has. In a gated FFN it is act(gate(x))·up(x), so that z > 0 is not what LAPE
calls an active neuron, act(gate(x)) > 0.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hones_offline.attribution.write_in import mean_write_in
from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Importance, NeuronIndex
from hones_offline.running.backward import factor_gradients, frozen, rows_at_once
from hones_offline.running.batching import PrefixBatch, batches
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import recorded_ffn
from hones_offline.running.prompts import Prepared
from hones_steer.errors import DataError


def activation_probability(prepared: Prepared, execution: Execution) -> Importance:
    """AP: the share of (prompt, answer) pairs whose z is positive."""
    return _mean_of_z(prepared, execution, lambda z: z > 0)


def mean_activation(prepared: Prepared, execution: Execution) -> Importance:
    """MA: the mean of |z| over (prompt, answer) pairs."""
    return _mean_of_z(prepared, execution, torch.abs)


def _mean_of_z(prepared: Prepared, execution: Execution, function: Callable[[Tensor], Tensor]) -> Importance:
    """The mean over (prompt, answer) pairs of a function of z [rows, I] at the prompt's last token."""
    decoder, index = prepared.decoder, NeuronIndex.of(prepared.decoder.layout)
    prompts = [prompt for prompt, _ in prepared.pairs()]
    total = np.zeros(index.size)
    for numbers in batches([len(prompt) for prompt in prompts], execution.batch_size):
        batch = PrefixBatch([prompts[i] for i in numbers], [1] * len(numbers), decoder.device)
        with torch.no_grad(), recorded_ffn(decoder.layout, batch.ends - 1) as recorded:
            batch.run(decoder.run)
        for layer, z in recorded.items():
            total[index.layer(layer)] += function(z).sum(0, dtype=torch.float64).cpu().numpy()
    return Importance(index, (total / len(prompts)).astype(np.float32))


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
        for layer, of_layer in gradients.items():
            total[index.layer(layer)] = of_layer.sum(0, dtype=torch.float64).cpu().numpy()
        return total

    units = [partial(of_batch, numbers) for numbers in batches([len(p) + len(a) for p, a in pairs], rows)]
    with frozen(decoder.model):
        total = execution.processes.sum(units, (index.size,))
    return Importance(index, (total / len(pairs)).astype(np.float32))


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
