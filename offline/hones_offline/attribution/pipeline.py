"""Attribution: from a task's examples to its bank of neurons (paper section 3).

`find_bank` is the method. `attribute` is it on a model, a processor and examples, with a run folder; a comparison of
methods (`hones_offline.comparison`) draws examples and calls it for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from hones_offline.attribution.contrast import Contrast, check_contrast, contrasted
from hones_offline.attribution.heads import (
    HeadMetric,
    HeadScores,
    HeadSearch,
    HeadWeights,
    Preselection,
    Race,
    WeightedHead,
    base_statistics,
    head_scores,
    head_statistics,
    require_replaceable_heads,
    top_heads,
    utility,
    weigh,
)
from hones_offline.attribution.methods import AttributionOptions
from hones_offline.attribution.patching import preselect
from hones_offline.attribution.racing import race
from hones_offline.attribution.write_in import (
    WRITE_IN,
    PositivePart,
    Target,
    target_directions,
)
from hones_offline.data.examples import Example
from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Bank, Importance, NeuronIndex
from hones_offline.data.tasks import Task
from hones_offline.running.distributed import ALONE, Processes, open_run, usable_everywhere
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.run_folder import run_settings, step_name
from hones_steer.errors import DataError


@dataclass(frozen=True)
class Attribution:
    """A task's bank, and everything on the way to it."""

    head_scores: npt.NDArray[np.float32]
    """S(h), float32 [L, H], NaN where a layer has fewer heads or none; [0, 0] for a method without heads."""
    importance: Importance
    """I_{l,i}, not contrasted; `numpy.asarray` gives float32 [L, I]."""
    bank: Bank
    """The neurons of the top fraction, by contrast where it was asked for, {layer: int32 indices}."""
    heads: list[WeightedHead]
    """The heads that guided the importance as (layer, head, weight), in the order of their scores, if any did."""
    base: float
    """The utility of the untouched model on the discovery examples."""
    n: int
    """Examples used."""
    failures: dict[str, str]
    """Ids of the examples that could not be used, with the reason."""
    race: Race | None = None
    """The evaluations saved, if heads raced; scores of the heads it dropped are estimates from some of the examples."""
    preselection: Preselection | None = None
    """The evaluations saved, if heads were preselected; the other heads' scores are estimates, or NaN (`patching`)."""


def attribute(
    model: nn.Module,
    processor: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    top_heads: int = 30,
    top_fraction: float = 0.01,
    head_metric: HeadMetric = "task",
    method: str = "fisher",
    target: Target = "paper",
    positive_part: PositivePart = "mean",
    head_weights: HeadWeights = "score",
    heads: HeadSearch = "exact",
    error: float = 0.05,
    margin: float = 1.5,
    against: Sequence[Importance] = (),
    contrast: Contrast = "ratio",
    seed: int = 3407,
    batch_size: int = 16,
    memory_gb: float = 4.0,
    run_dir: str | Path | None = None,
    max_failures: float = 0.05,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Attribution:
    """Find the FFN neurons a task depends on: by their factors' Fisher information, or as in arXiv 2604.17941.

    Args:
        model: a Hugging Face causal LM or VLM, in eval mode.
        processor: its processor; the tokenizer for a text-only model.
        task: the task.
        examples: the discovery examples.
        top_heads: how many heads guide the importance, for methods with heads (30 for LLaVA-1.5-7B, 25 for
            Qwen2.5-VL-7B).
        top_fraction: the bank's share of all FFN neurons, those of all experts included.
        head_metric: the utility that heads are scored by, and that the untouched model has: the task's metric under
            greedy generation ("task", the paper's) or the mean log-probability of the answers ("logprob": one forward
            per batch, so much faster).
        method: "fisher", "grad_all" or "grad_abs" (mean square, mean and absolute mean of the utility's gradient by the
            neuron's factor); guided by heads, "hones" (the paper's, section 3) or "head_grad" (the head-mediated
            gradient); "dvp" (the write-in alone), "grad_act" (gradient × activation at the last prompt token), "ap" and
            "ma" (activation probability and mean activation), "random". docs/methods.md says whose they are.
        target: the direction of the write-in: the "paper"'s, "contrastive" (less that of the other answers) or
            "centred" (of unembedding rows less their mean).
        positive_part: taken of the "mean" over examples (the paper's) or of each "example" before the mean.
        head_weights: the heads' weights in the importance: their "score" (the paper's) or their "rank".
        heads: "exact" runs every head on every example; "race" stops running a head once it has surely lost (see
            `racing`, which also says when it should not be trusted); "patch" runs only those that attribution patching
            estimates highest, by log-probability whatever the metric (see `patching`).
        error: with "race", the probability that it finds other heads than "exact" does.
        margin: with "patch", how many heads more than `top_heads` are run, as a share of it.
        against: the importance of other tasks (`Attribution.importance`) by the same method on this model; the bank
            then holds neurons that matter to this task and not to them.
        contrast: how it is told, by "max" or "ratio" (see `contrast`); nothing without `against`.
        seed: shuffles the examples before they are batched.
        batch_size: sequences run at a time.
        memory_gb: GiB for the hidden states that enter the layers and what their heads put out, of the sequences taken
            together: sequences · tokens · (hidden size + heads · head size) · bytes of the dtype for each layer
            (LLaVA-1.5-7B in bfloat16, 16 sequences of 640 tokens: 160 MiB, so 5 GiB for its 32). With less than all
            layers need, the forward they come from is repeated, once for every so many layers as fit. With head_metric
            "task" as much again for each of two KV caches: of the undisturbed answers, and of those that wait to be
            decoded (one batch at least). A method that runs the model backward runs as many pairs together as it can
            keep the forward of in so much. Model, activations and the KV cache of the batch being run come on top.
        run_dir: folder that keeps the results of each few examples and layers, so that a killed run can be resumed.
        max_failures: share of examples whose image may be unusable before it is an error.
        progress: show progress bars on a terminal.
        processes: which share the work, each calling this with the same arguments; see `distributed.launched`.

    Raises:
        DataError: no usable example, too many failures, no head or neuron that matters, a setting out of range, or a
            run with other settings.
        LayoutError: the model's structure is not supported, or the method needs a backward pass that the model, a
            quantized one, does not have.
        StateError: another of `processes` has ended.
    """
    options = AttributionOptions(
        method=method,
        head_metric=head_metric,
        top_heads=top_heads,
        top_fraction=top_fraction,
        target=target,
        positive_part=positive_part,
        head_weights=head_weights,
        heads=heads,
        error=error,
        margin=margin,
        seed=seed,
    )
    check_contrast(contrast)
    execution = Execution(batch_size, memory_gb, processes, progress=progress)
    order = np.random.default_rng(seed).permutation(len(examples))
    shuffled = [examples[i] for i in order]
    prepared = prepare(model, processor, task, shuffled, max_failures=max_failures, progress=execution.shows_progress)
    if processes.size > 1:
        prepared = usable_everywhere(prepared, max_failures, processes)
    if options.entry.guided:
        require_replaceable_heads(prepared.decoder.layout)
    options.entry.check(prepared, execution)
    for other in against:
        if other.index != NeuronIndex.of(prepared.decoder.layout):
            raise DataError("an importance in `against` has other neurons than the model; find it on the same model")
    folder = open_run(run_dir, attribution_settings(prepared, options, execution), processes)
    return find_bank(prepared, options, replace(execution, folder=folder), against=against, contrast=contrast)


def attribution_settings(prepared: Prepared, options: AttributionOptions, execution: Execution) -> dict[str, Any]:
    """Everything that decides the bytes of an attribution (the bank's size does not: it is cut from the importance)."""
    search: dict[HeadSearch, dict[str, Any]] = {
        "exact": {},
        "race": {"heads": "race", "error": options.error},
        "patch": {"heads": "patch", "margin": options.margin},
    }
    return {
        "stage": "attribute",
        "write_in": WRITE_IN,
        **run_settings(prepared),
        "top_heads": options.top_heads,
        "head_metric": options.head_metric,
        "seed": options.seed,
        "batch_size": execution.batch_size,
        "memory_gb": execution.memory_gb,
        "method": options.method,
        "target": options.target,
        "positive_part": options.positive_part,
        "head_weights": options.head_weights,
        **search[options.heads],
    }


def find_bank(
    prepared: Prepared,
    options: AttributionOptions,
    execution: Execution,
    *,
    scores: HeadScores | None = None,
    all_tasks: Sequence[HeadScores] = (),
    against: Sequence[Importance] = (),
    contrast: Contrast = "ratio",
) -> Attribution:
    """Find the neurons a task depends on, from its encoded examples (paper section 3; formulas in docs/methods.md).

    1. Directions: the unit vector u_y of each example's answer, in the model's hidden space.
    2. Scores: S(h), what replacing each head by the mean of its layer's others costs the task.
    3. Heads: the K heads with the highest scores, each with its weight w_h.
    4. Importance: I of every neuron, Σ_h w_h · [what replacing h takes from the neuron's write-in along u_y]_+.
    5. Bank: the neurons with the highest importance, or with the highest contrast to that of other tasks.

    A method without heads has none in 3, and of 2 the untouched model's utility only; it may need no directions, and 4
    is its own. Results are kept in the execution's run folder, in resumable steps.

    Args:
        prepared: the examples, encoded for the model.
        options: the method, and what decides its result.
        execution: how it is run.
        scores: the result of 2 where it is known already.
        all_tasks: the scores of all tasks, this one included, for the options `leave_out` and `by_damage`.
        against: the importance of other tasks by the same method, to choose the bank by contrast.
        contrast: how it is told that a neuron matters more to this task than to those.

    Raises:
        DataError: no head or neuron matters, or none matters more to this task than to the others, a target has no
            token, or `all_tasks` is missing.
    """
    directions = answer_directions(prepared, options)
    scores = scores or score_heads(prepared, options, execution)
    heads = guiding_heads(scores, options, all_tasks)
    importance = neuron_importance(prepared, directions, heads, options, execution)
    chosen = contrasted(importance, against, contrast, options.top_fraction) if against else importance
    return Attribution(
        head_scores=scores.by_head,
        importance=importance,
        bank=chosen.bank(options.top_fraction),
        heads=heads,
        base=scores.base,
        n=len(prepared),
        failures=dict(prepared.failures),
        race=scores.race,
        preselection=scores.preselection,
    )


def answer_directions(prepared: Prepared, options: AttributionOptions) -> Tensor | None:
    """Step 1: the target directions [examples, hidden], or None for a method that needs none."""
    return target_directions(prepared, options.target) if options.entry.directed else None


def score_heads(prepared: Prepared, options: AttributionOptions, execution: Execution) -> HeadScores:
    """Step 2: head scores, of all exactly, by a race or of a preselection; without heads the base utility alone."""
    metric = options.head_metric
    if not options.entry.guided:

        def compute(alone: Execution) -> dict[str, FloatArray]:
            return {"base": np.array([utility(prepared, metric, base_statistics(prepared, metric, alone))])}

        return HeadScores.none(float(execution.step_of_first("base", compute)["base"][0]))
    if options.heads == "race":
        return race(prepared, metric, execution, keep=options.top_heads, error=options.error)
    if options.heads == "patch":
        return preselect(prepared, metric, execution, keep=options.top_heads, margin=options.margin)
    return head_scores(prepared, metric, *head_statistics(prepared, metric, execution))


def guiding_heads(
    scores: HeadScores, options: AttributionOptions, all_tasks: Sequence[HeadScores] = ()
) -> list[WeightedHead]:
    """Step 3: the heads that guide the importance as (layer, head, weight), in the order of their scores.

    Heads that were not run on all items are not among them, nor, with `leave_out`, those that are among the strongest
    of every task. With `by_damage` a weight is divided by the mean harm that replacing the head does to all tasks. A
    method without heads has none.

    Raises:
        DataError: no head has a positive score, or `all_tasks` is missing.
    """
    if not options.entry.guided:
        return []
    if options.needs_all_tasks and not all_tasks:
        raise DataError("leave_out and by_damage compare tasks; give the scores of all tasks")
    eligible = scores.by_head.copy()
    if scores.finished is not None:
        eligible[~scores.finished] = -np.inf
    if options.leave_out:
        strongest = [top_heads(task.by_head, options.top_heads) for task in all_tasks]
        for layer, head in set.intersection(*({head[:2] for head in heads} for heads in strongest)):
            eligible[layer, head] = 0
    heads = weigh(top_heads(eligible, options.top_heads), options.head_weights)
    if options.by_damage:
        harm = np.mean([_relative(task.by_head) for task in all_tasks], axis=0)
        heads = [(layer, head, float(weight / harm[layer, head])) for layer, head, weight in heads]
    return heads


def _relative(scores: npt.NDArray[np.float32]) -> FloatArray:
    """Scores as shares of the highest, those below zero as zero."""
    positive = scores.astype(np.float64).clip(min=0)
    shares: FloatArray = positive / (np.nanmax(positive) or 1.0)
    return shares


def neuron_importance(
    prepared: Prepared,
    directions: Tensor | None,
    heads: Sequence[WeightedHead],
    options: AttributionOptions,
    execution: Execution,
) -> Importance:
    """Step 4: the importance of every neuron, one resumable step, named by everything that decides it."""
    entry = options.entry

    def compute(running: Execution) -> dict[str, npt.NDArray[np.float32]]:
        return {"importance": entry.importance(prepared, directions, heads, options, running).values}

    ids = [example.id for example in prepared.examples]
    decisive = [WRITE_IN, options.name, options.method_options, options.seed, list(heads), ids]
    values = execution.shared_step(step_name("importance", decisive), compute)["importance"]
    return Importance(NeuronIndex.of(prepared.decoder.layout), values)
