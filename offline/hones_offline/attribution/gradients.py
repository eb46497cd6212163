"""Importance of neurons by the gradient of the utility, over all positions that masking and steering act on.

g_{x,i} = Σ z_i·∂P_x/∂z_i is the gradient of example x's utility by a factor on neuron i, at 1: what scaling the neuron
by 1 + ε changes, per ε. P_x is the mean over the example's (prompt, answer) pairs of the mean log-probability of the
answer's tokens. Its mean over examples and its mean square come from one pass, one resumable step for all the methods
made from them. docs/methods.md has the definitions.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Importance, NeuronIndex
from hones_offline.running.backward import Pair, factor_gradients, frozen, rows_at_once
from hones_offline.running.batching import batches
from hones_offline.running.execution import Execution
from hones_offline.running.progress import progress_bar
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import step_name


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
    """The means over examples of g and of g², float64 [2, N]: one resumable step that the processes share.

    Raises:
        LayoutError: the model cannot be run backward.
        DataError: the longest example needs more memory than the execution has.
    """
    name = step_name("gradients", [example.id for example in prepared.examples])
    moments: FloatArray = execution.shared_step(name, lambda running: {"moments": _moments(prepared, running)})[
        "moments"
    ]
    return moments


def _moments(prepared: Prepared, execution: Execution) -> FloatArray:
    pairs = prepared.pairs_by_example()
    rows = rows_at_once(prepared, execution)
    lengths = [max(len(prompt) + len(answer) for prompt, answer in own) for own in pairs]
    chosen = list(batches(lengths, max(1, rows // max(map(len, pairs)))))
    shape = (2, NeuronIndex.of(prepared.decoder.layout).size)
    with (
        frozen(prepared.decoder.model),
        progress_bar(f"{prepared.task.name}: gradients", len(chosen), show=execution.shows_progress) as bar,
    ):

        def of_batch(items: Sequence[int]) -> FloatArray:
            gradients = example_gradients(prepared, [pairs[i] for i in items], rows)
            bar.update(execution.processes.size)
            return np.stack([gradients.sum(0), np.square(gradients).sum(0)])

        total = execution.processes.sum([partial(of_batch, items) for items in chosen], shape)
    return total / len(prepared)


def example_gradients(prepared: Prepared, pairs: Sequence[Sequence[Pair]], rows: int) -> FloatArray:
    """Compute g of each example, the mean over its `pairs`: float64 [examples, N]; `rows` pairs run at a time."""
    index = NeuronIndex.of(prepared.decoder.layout)
    gradients = np.zeros((len(pairs), index.size))
    flat = [(example, pair) for example, own in enumerate(pairs) for pair in own]
    for start in range(0, len(flat), rows):
        examples, some = zip(*flat[start : start + rows], strict=True)
        for layer, of_layer in factor_gradients(prepared.decoder, some).items():
            np.add.at(gradients[:, index.layer(layer)], list(examples), of_layer.double().cpu().numpy())
    gradients /= np.array([len(own) for own in pairs])[:, None]
    return gradients
