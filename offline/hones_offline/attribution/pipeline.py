"""Attribution from examples to a neuron bank: examples → head scores → importance → bank (paper section 3).

`fit` takes the bank on to scales and a profile, `evaluate` measures what they do.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from hones_offline.attribution.baselines import Baseline, baseline
from hones_offline.attribution.heads import (
    HeadMetric,
    base_statistics,
    head_count,
    head_scores,
    head_statistics,
    top_heads,
    utility,
)
from hones_offline.attribution.racing import Race, race
from hones_offline.attribution.write_in import (
    WRITE_IN,
    HeadWeights,
    PositivePart,
    Target,
    importance,
    target_directions,
    weigh,
)
from hones_offline.data.examples import Example
from hones_offline.data.neurons import Bank, check_bank, check_fraction, select_bank
from hones_offline.data.tasks import Task
from hones_offline.running.distributed import ALONE, Processes, open_run, usable_everywhere
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.run_folder import RunFolder, check_seed, run_settings
from hones_steer.errors import DataError

Heads = Literal["exact", "race"]
Method = Literal["hones"] | Baseline
METHODS: tuple[Method, ...] = ("hones", *get_args(Baseline))


@dataclass(frozen=True)
class MethodOptions:
    """Which method, and what in it differs from the paper's (docs/methods.md has the definitions)."""

    method: Method = "hones"
    target: Target = "paper"
    positive_part: PositivePart = "mean"
    head_weights: HeadWeights = "score"

    def __post_init__(self) -> None:
        known = {"method": METHODS, "target": get_args(Target)}
        known |= {"positive_part": get_args(PositivePart), "head_weights": get_args(HeadWeights)}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise DataError(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}")
        needed = {"target": ("hones", "dvp"), "positive_part": ("hones",), "head_weights": ("hones",)}
        for name, users in needed.items():
            if getattr(self, name) != getattr(type(self), name) and self.method not in users:
                raise DataError(f"method {self.method!r} takes no {name}; leave it out")


@dataclass(frozen=True)
class Attribution:
    """What was found for one task."""

    head_scores: npt.NDArray[np.float32]
    """S(h), float32 [L, H]; [0, 0] for a method without heads."""
    importance: npt.NDArray[np.float32]
    """I_{l,i}, float32 [L, I]."""
    bank: Bank
    """The neurons of the top fraction, {layer: int32 indices}."""
    heads: list[tuple[int, int, float]]
    """The task's heads as (layer, head, weight), strongest first; none for a method without heads."""
    base: float
    """The utility of the untouched model on the discovery examples."""
    n: int
    """Examples used."""
    failures: dict[str, str]
    """Ids of the examples that could not be used, with the reason."""
    race: Race | None = None
    """What racing saved, if heads raced; scores of the heads it dropped are estimates from some of the examples."""


def attribute(
    model: torch.nn.Module,
    processor: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    top_heads: int = 30,
    top_fraction: float = 0.01,
    head_metric: HeadMetric = "task",
    method: Method = "hones",
    target: Target = "paper",
    positive_part: PositivePart = "mean",
    head_weights: HeadWeights = "score",
    heads: Heads = "exact",
    error: float = 0.05,
    without: Sequence[Bank] = (),
    seed: int = 3407,
    batch_size: int = 16,
    memory_gb: float = 4.0,
    run_dir: str | Path | None = None,
    max_failures: float = 0.05,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Attribution:
    """Find the FFN neurons a task depends on: the method of arXiv 2604.17941, section 3.

    Args:
        model: a Hugging Face causal LM or VLM, in eval mode.
        processor: its processor; the tokenizer for a text-only model.
        task: the task.
        examples: the discovery examples.
        top_heads: how many heads guide the importance (30 for LLaVA-1.5-7B, 25 for Qwen2.5-VL-7B).
        top_fraction: the bank's share of all L·I neurons.
        head_metric: score heads by the task's metric under greedy generation ("task", the paper's) or by the mean
            log-probability of the answers ("logprob": one forward per batch, so much faster).
        method: "hones", or a baseline without heads: "dvp" (the write-in alone), "ap" and "ma" (activation probability
            and mean activation), "grad_act" (gradient × activation), "random".
        target: the direction of the write-in: the "paper"'s, "contrastive" (less that of the other answers) or
            "centred" (of unembedding rows less their mean).
        positive_part: taken of the "mean" over examples (the paper's) or of each "example" before the mean.
        head_weights: the heads' weights in the importance: their "score" (the paper's) or their "rank".
        heads: "exact" runs every head on every example; "race" stops running a head once it has surely lost (see
            `racing`, which also says when it should not be trusted).
        error: with "race", the probability that it finds other heads than "exact" does.
        without: banks of other tasks on this model, whose neurons are passed over: the bank then holds this task's own
            (design 2.4), as many as without.
        seed: shuffles the examples before they are batched.
        batch_size: sequences run at a time.
        memory_gb: GiB for the hidden states that enter the layers and what their heads put out, of the sequences taken
            together: sequences · tokens · (hidden size + heads · head size) · bytes of the dtype for each layer
            (LLaVA-1.5-7B in bfloat16, 16 sequences of 640 tokens: 160 MiB, so 5 GiB for its 32). With less than all
            layers need, the forward they come from is repeated, once for every so many layers as fit. With head_metric
            "task" as much again for each of two KV caches: of the undisturbed answers, and of those that wait to be
            decoded (one batch at least). Model, activations and the KV cache of the batch being run come on top.
        run_dir: folder that keeps the results of each few examples and layers, so that a killed run can be resumed.
        max_failures: share of examples whose image may be unusable before it is an error.
        progress: show progress bars on a terminal.
        processes: which share the work, each calling this with the same arguments; see `distributed.launched`.

    Raises:
        DataError: no usable example, too many failures, no head or neuron that matters, a setting out of range, or a
            run with other settings.
        LayoutError: the model's structure is not supported.
        StateError: another of `processes` has ended.
    """
    _check_settings(top_heads, top_fraction, head_metric, batch_size, memory_gb)
    options = MethodOptions(method, target, positive_part, head_weights)
    _check_race(heads, error, options.method)
    check_seed(seed)
    order = np.random.default_rng(seed).permutation(len(examples))
    prepared = prepare(
        model,
        processor,
        task,
        [examples[i] for i in order],
        max_failures=max_failures,
        progress=progress and processes.rank == 0,
    )
    if processes.size > 1:
        prepared = usable_everywhere(prepared, max_failures, processes)
    settings: dict[str, Any] = {
        "top_heads": top_heads,
        "head_metric": head_metric,
        "seed": seed,
        "batch_size": batch_size,
        "memory_gb": memory_gb,
        **asdict(options),
        **({"heads": heads, "error": error} if heads == "race" else {}),
    }
    for layer in prepared.decoder.layout.layers:
        head_count(layer)
    for bank in without:
        check_bank(bank, prepared.decoder.layout)
    run = open_run(run_dir, attribution_run_settings(prepared, settings), processes)
    found = find_bank(
        prepared,
        count=top_heads,
        top_fraction=top_fraction,
        head_metric=head_metric,
        options=options,
        seed=seed,
        heads=heads,
        error=error,
        batch_size=batch_size,
        memory_gb=memory_gb,
        run=run,
        progress=progress,
        processes=processes,
    )
    return replace(found, bank=select_bank(found.importance, top_fraction, without)) if without else found


def attribution_run_settings(prepared: Prepared, settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the bytes of an attribution (the bank's size does not: it is cut from the importance)."""
    return {
        "stage": "attribute",
        "write_in": WRITE_IN,
        **run_settings(prepared),
        **settings,
    }


def find_bank(
    prepared: Prepared,
    *,
    count: int,
    top_fraction: float,
    head_metric: HeadMetric,
    options: MethodOptions = MethodOptions(),
    seed: int = 0,
    heads: Heads = "exact",
    error: float = 0.05,
    batch_size: int,
    memory_gb: float = 4.0,
    run: RunFolder | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Attribution:
    """`attribute` on examples that are already encoded; some heads on some examples are one resumable step."""
    _check_settings(count, top_fraction, head_metric, batch_size, memory_gb)
    _check_race(heads, error, options.method)
    execution = Execution(batch_size, memory_gb, processes, run, progress)
    if options.method != "hones":
        return _without_heads(prepared, options, top_fraction, head_metric, execution, seed=seed)
    # First, so that a target without tokens is found before hours of work.
    directions = target_directions(prepared, options.target)
    raced = None
    if heads == "race":
        base, scores, finished, raced = race(prepared, head_metric, execution, keep=count, error=error)
        best = top_heads(np.where(finished, scores, -np.inf), count)
    else:
        base, scores = head_scores(prepared, head_metric, *head_statistics(prepared, head_metric, execution))
        best = top_heads(scores, count)
    best = weigh(best, options.head_weights)

    def write_in() -> dict[str, npt.NDArray[Any]]:
        values = importance(prepared, directions, best, execution, positive_part=options.positive_part)
        return {"importance": values, "head_scores": scores}

    if run is None:
        found = write_in()
    else:
        values = {} if processes.from_first(lambda: run.holds("attribution")) else write_in()
        found = processes.from_first(lambda: run.arrays("attribution", lambda: values))
    bank = select_bank(found["importance"], top_fraction)
    return Attribution(scores, found["importance"], bank, best, base, len(prepared), dict(prepared.failures), raced)


def _without_heads(
    prepared: Prepared,
    options: MethodOptions,
    top_fraction: float,
    head_metric: HeadMetric,
    execution: Execution,
    *,
    seed: int,
) -> Attribution:
    """The bank by a baseline, found by the first process, which also measures the untouched model's utility."""
    method = options.method
    assert method != "hones"

    def compute() -> dict[str, npt.NDArray[Any]]:
        values = baseline(prepared, method, batch_size=execution.batch_size, target=options.target, seed=seed)
        base = utility(prepared, head_metric, base_statistics(prepared, head_metric, execution))
        return {"importance": values, "base": np.array([base])}

    found = execution.processes.from_first(lambda: execution.arrays("attribution", compute))
    nothing = np.zeros((0, 0), dtype=np.float32)
    bank, failures = select_bank(found["importance"], top_fraction), dict(prepared.failures)
    return Attribution(nothing, found["importance"], bank, [], float(found["base"][0]), len(prepared), failures)


def _check_settings(top_heads: int, top_fraction: float, head_metric: str, batch_size: int, memory_gb: float) -> None:
    """Before hours of work, not after them."""
    for name, value in {"top_heads": top_heads, "batch_size": batch_size}.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1, not {value}")
    if not 0 < memory_gb < math.inf:
        raise DataError(f"memory_gb must be positive, not {memory_gb}")
    check_fraction(top_fraction)
    if head_metric not in get_args(HeadMetric):
        raise DataError(f"head_metric must be 'task' or 'logprob', not {head_metric!r}")


def _check_race(heads: str, error: float, method: str) -> None:
    if heads not in get_args(Heads):
        raise DataError(f"heads must be 'exact' or 'race', not {heads!r}")
    if not 0 < error < 1:
        raise DataError(f"error is a probability between 0 and 1, not {error}")
    if heads == "race" and method != "hones":
        raise DataError(f"method {method!r} scores no heads; leave heads='race' out")
