"""What attribution is compared with: importance of FFN neurons found without heads (design 2.7).

All look where the write-in looks: at z, the input of the down-projection, at a prompt's last token; and give float32
[L, I], more important is higher. The write-in is of each example's first prompt, the others are of each (prompt,
answer) pair that is learned. z is what masking and steering act on and what every architecture has. In a gated FFN it
is act(gate(x))·up(x), so that z > 0 is not what LAPE calls an active neuron, act(gate(x)) > 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hones_offline.attribution.write_in import Target, mean_write_in, target_directions
from hones_offline.running.decoder import Rows, batches
from hones_offline.running.evaluation import mean_log_probabilities
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import ffn_inputs, recorded_ffn
from hones_offline.running.prompts import Prepared
from hones_steer.errors import DataError

Importance = npt.NDArray[np.float32]
Baseline = Literal["dvp", "ap", "ma", "grad_act", "random"]


def baseline(
    prepared: Prepared, method: Baseline, *, batch_size: int, target: Target = "paper", seed: int = 0
) -> Importance:
    """The importance by the baseline of that name; `target` is for "dvp", `seed` for "random"."""
    match method:
        case "dvp":
            return write_in(prepared, batch_size=batch_size, target=target)
        case "ap":
            return activation_probability(prepared, batch_size=batch_size)
        case "ma":
            return mean_activation(prepared, batch_size=batch_size)
        case "grad_act":
            return gradient_activation(prepared, batch_size=batch_size)
        case "random":
            layout = prepared.decoder.layout
            shape = (len(layout.layers), layout.intermediate_size)
            drawn: Importance = np.random.default_rng(seed).random(shape, dtype=np.float32)
            return drawn


def activation_probability(prepared: Prepared, *, batch_size: int) -> Importance:
    """AP: the share of pairs whose z is positive."""
    return _mean(prepared, lambda z: z > 0, batch_size)


def mean_activation(prepared: Prepared, *, batch_size: int) -> Importance:
    """MA: the mean of |z|."""
    return _mean(prepared, torch.abs, batch_size)


def _mean(prepared: Prepared, of: Callable[[Tensor], Tensor], batch_size: int) -> Importance:
    decoder = prepared.decoder
    prompts = [prompt for prompt, _ in prepared.pairs()]
    total = np.zeros((len(decoder.layout.layers), decoder.layout.intermediate_size))
    for chosen in batches([len(prompt) for prompt in prompts], batch_size):
        rows = Rows(decoder, [prompts[i] for i in chosen], [1] * len(chosen))
        with torch.no_grad(), recorded_ffn(decoder.layout, rows.ends - 1) as recorded:
            rows.run(decoder.run)
        for layer, z in recorded.items():
            total[layer] += of(z).sum(0, dtype=torch.float64).cpu().numpy()
    mean: Importance = (total / len(prompts)).astype(np.float32)
    return mean


def write_in(prepared: Prepared, *, batch_size: int, target: Target = "paper") -> Importance:
    """DVP, the direct write-in or logit lens: the mean of c_{l,i} over examples, no head replaced."""
    (mean,) = mean_write_in(prepared, target_directions(prepared, target), Execution(batch_size))
    importance: Importance = mean.astype(np.float32)
    return importance


def gradient_activation(prepared: Prepared, *, batch_size: int) -> Importance:
    """Gradient × activation: the mean of z·∂P/∂z, P the answer's mean token log-probability.

    Signed, as in attribution patching: to first order what P loses when z is set to 0, which is what masking does. The
    forward holds all layers' z, so memory grows with `batch_size` as in learning.
    """
    decoder, pairs = prepared.decoder, prepared.pairs()
    total = np.zeros((len(decoder.layout.layers), decoder.layout.intermediate_size))
    for chosen in batches([len(prompt) + len(answer) for prompt, answer in pairs], batch_size):
        prompts, answers = zip(*(pairs[i] for i in chosen), strict=True)
        batch = decoder.collate(
            [decoder.answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        )
        with torch.enable_grad(), ffn_inputs(decoder.layout) as recorded:
            # The weights may be frozen; the graph then begins at the embeddings.
            hidden, _ = decoder.run(replace(batch, embeds=batch.embeds.requires_grad_()))
            ends = torch.full((len(hidden),), hidden.shape[1])
            utility = mean_log_probabilities(decoder, hidden, ends, answers).sum()
            gradients = torch.autograd.grad(utility, list(recorded.values()))
        rows, last = range(len(answers)), [-len(answer) for answer in answers]
        for (layer, z), gradient in zip(recorded.items(), gradients, strict=True):
            products = z.detach()[rows, last].double() * gradient[rows, last].double()
            total[layer] += products.sum(0).cpu().numpy()
    mean: Importance = (total / len(pairs)).astype(np.float32)
    return mean


_ACTIVE = 0.95  # LAPE's: a neuron is a task's own if its probability there is in the top 5% of all


def activation_entropy(probabilities: Mapping[str, Importance]) -> dict[str, Importance]:
    """APE: neurons that are active in few of the tasks, from each task's activation probability (LAPE, ACL 2024).

    A neuron's probabilities over the tasks are normalised to sum 1; importance is ln(tasks) less their entropy, the
    same for every task. As in LAPE a neuron is a task's own only if its probability there is in the top 5% of all
    neurons' in all tasks. LAPE's banks have whatever size that gives; here those neurons come first (by ln(tasks)
    more) and the others after them, so that banks have the size asked for.

    Raises:
        DataError: there are fewer than two tasks to compare.
    """
    if len(probabilities) < 2:
        raise DataError("method 'ape' compares tasks; give at least two")
    stacked = np.stack(list(probabilities.values())).astype(np.float64)  # [tasks, L, I]
    total = stacked.sum(0)
    shares = stacked / np.where(total > 0, total, 1)
    logarithms = np.log(np.where(shares > 0, shares, 1))
    top = np.log(len(stacked))
    specific = np.where(total > 0, top + (shares * logarithms).sum(0), 0).clip(min=0)
    active = stacked >= np.quantile(stacked, _ACTIVE)
    return {task: (specific + top * own).astype(np.float32) for task, own in zip(probabilities, active, strict=True)}
